"""A forecast of memory against what torch's allocator gives out in the run itself."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from ftlevel.commands.plan import PlanOptions, plan
from ftlevel.config import TrainConfig
from ftlevel.fast.cross_entropy import MIN_TARGETS, targets_per_chunk
from ftlevel.models.upstream.fake import FakeTensor, OperationWatch, new_fake, storage_of
from ftlevel.training.forecast import memory
from ftlevel.training.forecast.fits import MAX_BLOCKS
from ftlevel.training.forecast.memory import estimate_step_memory
from ftlevel.training.forecast.meta_model import LiveMemoryTracker
from ftlevel.training.plan.resolve import resolve

ModelDir = Callable[..., Path]
MEMORY = 2**33
BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "plan.py"


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("plan_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_rows(path: Path, classes: bool) -> Path:
    words = ["the", "value", "of", "an", "object", "file", "argument"]
    draw = random.Random(0)  # alike and no two the same, so that every step is as full
    rows = [
        {"text": " ".join(draw.choices(words, k=60))} | ({"label": "ab"[at % 2]} if classes else {})
        for at in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configure(tmp_path: Path, model: Path, method: str, classes: bool, **train: Any) -> TrainConfig:
    return TrainConfig.model_validate({
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "task": "text-classification" if classes else "text-generation",
        "method": {"kind": method, **({"r": 8} if method == "shira" else {})},
        "data": {"dataset": str(save_rows(tmp_path / "rows.jsonl", classes)), "cache": False,
                 "validation_split": 0},
        "train": {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", **train},
        "speed": {"verify": False},
        "output": {"dir": str(tmp_path / "run")},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("family", "method", "train"),
    [
        ("llama", "lora", {}),
        ("llama", "qlora", {}),
        ("llama", "full", {"gradient_accumulation_steps": 2}),
        ("bert", "adapter", {"gradient_checkpointing": True}),
        ("bert", "qlora", {}),  # its linears have biases
        ("bert", "shira", {}),  # sparse tensors
    ],
)
def test_it_is_the_peak_of_the_run(
    tmp_path: Path, tiny_model_dir: ModelDir, family: str, method: str, train: dict[str, Any]
) -> None:
    config = configure(tmp_path, tiny_model_dir(family), method, family == "bert", **train)
    found = estimate_step_memory(resolve(config), MEMORY)
    measured = benchmark().measured(config)["peak"]
    assert found.peak == pytest.approx(measured, rel=0.05)
    assert found.parts["quantized weights" if method == "qlora" else "weights"] > 0


@pytest.mark.parametrize("grad_cache", ["never", "always"])
def test_it_knows_which_graphs_an_embedding_step_keeps(
    tmp_path: Path, tiny_model_dir: ModelDir, grad_cache: str
) -> None:
    """Four micro-batches stay in memory together, or only one of them."""
    draw, words = random.Random(0), ["the", "value", "of", "an", "object", "file", "argument"]
    rows = [
        {
            "anchor": " ".join(draw.choices(words, k=60)),
            "positive": " ".join(draw.choices(words, k=60)),
        }
        for _ in range(8)
    ]
    config = configure(tmp_path, tiny_model_dir("bert", "mlm"), "lora", classes=False)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config.with_sections(
        task="embedding",
        data={"dataset": str(path), "cache": False},
        embedding={"grad_cache": grad_cache},
        speed={"verify": False, "tokens_per_micro_batch": 256},
    )
    found = estimate_step_memory(resolve(config), MEMORY)
    measured = benchmark().measured(config)["peak"]
    assert found.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("family", "task", "method", "quant"),
    [
        ("bart", "summarization", {"kind": "lora"}, "none"),  # adds a constant to its scores
        ("bert", "text-classification", {"kind": "lora", "use_dora": True}, "4bit"),
        ("bert", "text-classification", {"kind": "hira"}, "4bit"),
        ("mixtral", "text-generation", {"kind": "lora"}, "4bit"),
    ],
)
def test_it_is_known_of_a_config(
    tiny_model_dir: ModelDir, family: str, task: str, method: dict[str, Any], quant: str
) -> None:
    config = TrainConfig.model_validate({
        "model": {"name_or_path": str(tiny_model_dir(family))}, "task": task, "method": method,
        "quant": {"kind": quant}, "data": {"max_length": 32},
    })  # fmt: skip
    parts = plan(config, PlanOptions(alternatives=False)).need.parts
    assert ("quantized weights" in parts) == (quant == "4bit")
    assert parts["activations"] > 0


@pytest.mark.parametrize(
    ("family", "layers", "sample"),
    [
        ("llama", {"num_hidden_layers": 7}, {0: 1, 1: 5, 6: 1}),
        ("gemma3_text", {"num_hidden_layers": 18, "sliding_window": 32,
                         "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3},
         {0: 1, 1: 14, 5: 2, 17: 1}),
        ("gpt_neo", {"num_layers": 10, "attention_types": [[["global", "local"], 5]]},
         {0: 1, 1: 4, 2: 4, 9: 1}),
        ("qwen3_moe", {"num_hidden_layers": 10, "mlp_only_layers": [0, 1, 2]},
         {0: 1, 1: 2, 3: 6, 9: 1}),
    ],
)  # fmt: skip
def test_a_layer_of_each_kind_gives_the_whole(
    tmp_path: Path, tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch,
    family: str, layers: dict[str, Any], sample: dict[int, int],
) -> None:  # fmt: skip
    config = configure(tmp_path, tiny_model_dir(family, **layers), "lora", classes=False)
    if family == "qwen3_moe":
        attention = config.method.model_copy(update={"target_modules": ["q_proj", "v_proj"]})
        config = config.model_copy(update={"method": attention})
    run = resolve(config)
    assert memory.LayerSample.of(run).sample == sample
    assert memory.count_computed_layers(run) <= MAX_BLOCKS
    extended = estimate_step_memory(run, MEMORY)
    monkeypatch.setattr(memory.LayerSample, "of", lambda _: memory.LayerSample((None,), (), 7))
    assert extended.peak == pytest.approx(estimate_step_memory(run, MEMORY).peak, rel=0.005)


def test_workers_hold_what_each_of_them_holds(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    config = configure(tmp_path, tiny_model_dir("llama"), "lora", classes=False)
    run = resolve(config)
    one = estimate_step_memory(run, MEMORY)
    two = estimate_step_memory(replace(run, fast=replace(run.fast, workers=2)), MEMORY)
    assert two.parts["weights"] == one.parts["weights"]
    assert two.tokens < one.tokens  # half of the budget is each one's
    assert two.parts["activations"] == pytest.approx(one.parts["activations"], rel=0.3)


def test_chunks_of_scores_take_their_share_of_a_gpu(
    tmp_path: Path, tiny_model_dir: ModelDir
) -> None:
    config = configure(tmp_path, tiny_model_dir("llama"), "lora", classes=False)
    run = resolve(config)
    on_gpu = replace(run, model=replace(run.model, device="cuda"))
    logits = [estimate_step_memory(on_gpu, size).parts["logits"] for size in (2**33, 2**22)]
    targets = [targets_per_chunk(size, run.model.vocabulary) for size in (2**33, 2**22)]
    assert targets[0] > 2 * targets[1] >= 2 * MIN_TARGETS  # the step has 8 · 60 of them at most
    assert logits[0] > logits[1]


class TestFakeTensor:
    def test_shapes_and_types_are_those_of_numbers(self) -> None:
        def compute(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                y = functional.linear(x, w)
            z = y.float().view(2, 2, 2, 4).transpose(1, 2)
            seen = functional.scaled_dot_product_attention(z, z, z, is_causal=True)
            return [y, z, seen, seen.softmax(-1)[..., :1]]

        real = compute(torch.randn(2, 2, 3), torch.randn(8, 3))
        fake = compute(new_fake((2, 2, 3), torch.float32), new_fake((8, 3), torch.float32))
        for made, expected in zip(fake, real, strict=True):
            assert isinstance(made, FakeTensor)
            assert made.device.type == "cpu"
            assert (made.shape, made.dtype, made.stride()) == (
                expected.shape, expected.dtype, expected.stride()
            )  # fmt: skip

    def test_a_mask_with_numbers_chooses(self) -> None:
        class Watch(OperationWatch):
            def on_result(self, tensor: torch.Tensor) -> None:
                pass

        with Watch():
            chosen = new_fake((4, 3), torch.float32)[torch.tensor([True, False, True, True])]
        assert chosen.shape == (3, 3)

    def test_views_share_their_storage(self) -> None:
        x = new_fake((4, 3), torch.float32)
        assert storage_of(x[1:].t()) is storage_of(x) or (
            storage_of(x[1:].t())._cdata == storage_of(x)._cdata
        )

    def test_what_is_known_of_an_operation_is_what_it_gives(self) -> None:
        def compute(x: torch.Tensor, row: torch.Tensor) -> list[torch.Tensor]:
            wide = x[1:3].t()
            scaled = wide * 2.0 + row
            scaled[0] += 1
            first, second = scaled.split(2, 0)
            return [wide, scaled, first, second, scaled.view(torch.int32), x.expand(2, 4, 3)]

        real = compute(torch.randn(4, 3), torch.randn(2))
        for _ in range(2):  # the second time every operation is known
            x = new_fake((4, 3), torch.float32)
            made = compute(x, new_fake((2,), torch.float32))
            for fake, expected in zip(made, real, strict=True):
                assert (fake.shape, fake.dtype, fake.stride(), fake.storage_offset()) == (
                    expected.shape, expected.dtype, expected.stride(), expected.storage_offset()
                )  # fmt: skip
                assert storage_of(fake).nbytes() == expected.untyped_storage().nbytes()
            cdata = [storage_of(fake)._cdata for fake in (x, *made)]
            assert [cdata.index(one) for one in cdata] == [0, 0, 2, 2, 2, 2, 0]

    def test_a_known_operation_tells_numbers_and_types_apart(self) -> None:
        x = new_fake((4,), torch.int64)
        assert [(x * by).dtype for by in (1, 1.0, 1)] == [torch.int64, torch.float32, torch.int64]
        assert [x.sum(0, keepdim=kept).dim() for kept in (False, True, False)] == [0, 1, 0]

    def test_what_is_written_to_is_returned(self) -> None:
        total = torch.zeros(3)
        kept = total
        total += new_fake((3,), torch.float32)
        assert total is kept


class TestLiveBytes:
    def test_a_tensor_counts_until_it_goes(self) -> None:
        with LiveMemoryTracker() as live:
            x = torch.zeros(1000)
            y = x * 2
            view = y[:10]
            del y
            assert live.total == 8000
            del view
            assert live.total == 4000
            assert live.peaks["forward"]["activations"] == 8000
        del x

    def test_what_is_held_as_something_else_counts_once(self) -> None:
        live = LiveMemoryTracker()
        x = torch.zeros(1000)
        live.add(x, "weights")
        live.add(x, "adapter")
        assert live.total == 4000
        assert live.peaks["forward"] == {"weights": 4000} or live.peaks["forward"]["adapter"]
