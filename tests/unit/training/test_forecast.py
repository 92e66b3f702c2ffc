"""Tests of memory estimates against the allocator's peak in the run."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback

from ftlevel.commands.plan import PlanOptions, plan
from ftlevel.commands.train import train
from ftlevel.config import TrainConfig
from ftlevel.events import NullListener
from ftlevel.fast.cross_entropy import MIN_TARGETS, targets_per_chunk
from ftlevel.models.loading import build_task_model
from ftlevel.models.module_tree import ModuleTree
from ftlevel.models.upstream.fake import FakeTensor, OperationWatch, new_fake, storage_of
from ftlevel.training.forecast import memory
from ftlevel.training.forecast.fits import MAX_BLOCKS
from ftlevel.training.forecast.memory import estimate_step_memory
from ftlevel.training.forecast.meta_model import LiveMemoryTracker
from ftlevel.training.plan.resolve import resolve

ModelDir = Callable[..., Path]
MEMORY = 2**33


class PeakMemory(TrainerCallback):
    """Measures the peak bytes of the model and of all allocations in training, by the profiler."""

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        tensors = [*model.parameters(), *model.buffers(), *quantization_scales(model)]
        sizes = {storage_of(t): t.untyped_storage().nbytes() for t in tensors}
        self.model_bytes = sum(sizes.values())
        activities = [torch.profiler.ProfilerActivity.CPU]
        self.profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self.profile.start()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.profile.stop()
        events = self.profile.profiler.kineto_results.events()
        memory_events = [event for event in events if event.name() == "[memory]"]
        memory_events.sort(key=lambda event: event.start_ns())
        changes = [event.nbytes() for event in memory_events]
        self.peak = self.model_bytes + max(itertools.accumulate(changes))


def quantization_scales(model: Any) -> Iterator[torch.Tensor]:
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if t is not None)
            state = state.state2


def measure_peak(config: TrainConfig) -> int:
    memory_of_run = PeakMemory()
    train(config, callbacks=[memory_of_run], listener=NullListener())
    return memory_of_run.peak


def save_rows(path: Path, classes: bool) -> Path:
    words = ["the", "value", "of", "an", "object", "file", "argument"]
    generator = random.Random(
        0
    )  # rows differ but have equal length, so that all steps are equally full
    rows = [
        {"text": " ".join(generator.choices(words, k=60))}
        | ({"label": "ab"[index % 2]} if classes else {})
        for index in range(16)
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
        ("bert", "qlora", {}),  # linear layers with biases
        ("bert", "shira", {}),  # sparse tensors
    ],
)
def test_estimate_matches_peak_of_run(
    tmp_path: Path, tiny_model_dir: ModelDir, family: str, method: str, train: dict[str, Any]
) -> None:
    config = configure(tmp_path, tiny_model_dir(family), method, family == "bert", **train)
    estimate = estimate_step_memory(resolve(config), MEMORY)
    measured = measure_peak(config)
    assert estimate.peak == pytest.approx(measured, rel=0.05)
    assert estimate.parts["quantized weights" if method == "qlora" else "weights"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_estimate_of_plain_step_matches_peak_of_run(
    tmp_path: Path, tiny_model_dir: ModelDir, dtype: str
) -> None:
    """A shorter row needs a mask in every layer; logits in 16 bits are copied in float32."""
    config = configure(tmp_path, tiny_model_dir("llama"), "lora", False).with_sections(
        model={"dtype": dtype}, speed={"fast": False}
    )
    words = ["the", "value", "of", "an", "object"] * 12
    texts = [" ".join((words[at % 5 :] + words[: at % 5])[at // 8 :]) for at in range(16)]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    estimate = estimate_step_memory(resolve(config), MEMORY)
    assert estimate.peak == pytest.approx(measure_peak(config), rel=5e-3)


@pytest.mark.parametrize(
    ("grad_cache", "rows"), [("never", 8), ("always", 8), ("auto", 8), ("never", 400)]
)
def test_estimate_depends_on_texts_of_a_step(
    tmp_path: Path, tiny_model_dir: ModelDir, grad_cache: str, rows: int
) -> None:
    """All four micro-batches stay in memory together, or only one of them.

    With auto, the first micro-batch is measured, and freed after the step. With 400 rows, of which
    8 are long, no step consists of long rows.
    """
    generator, words = random.Random(0), ["the", "value", "of", "an", "object", "file", "argument"]

    def create_text(row: int) -> str:
        return " ".join(generator.choices(words, k=60 if row % (rows // 8) == 0 else 20))

    path = tmp_path / "pairs.jsonl"
    pairs = ({"anchor": create_text(row), "positive": create_text(row)} for row in range(rows))
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    steps = 16 if rows > 8 else 2
    config = configure(tmp_path, tiny_model_dir("bert", "mlm"), "lora", False, max_steps=steps)
    config = config.with_sections(
        task="embedding",
        data={"dataset": str(path), "cache": False},
        embedding={"grad_cache": grad_cache},
        speed={"verify": False, "tokens_per_micro_batch": 256},
    )
    estimate = estimate_step_memory(resolve(config), MEMORY)
    measured = measure_peak(config)
    # The estimate and the run have the largest of 16 random steps each.
    assert estimate.peak == pytest.approx(measured, rel=0.1 if rows == 8 else 0.15)


@pytest.mark.parametrize(
    ("family", "task", "method", "quant"),
    [
        ("bart", "summarization", {"kind": "lora"}, "none"),  # adds a constant to its logits
        ("bert", "text-classification", {"kind": "lora", "use_dora": True}, "4bit"),
        ("bert", "text-classification", {"kind": "hira"}, "4bit"),
        ("mixtral", "text-generation", {"kind": "lora"}, "4bit"),
    ],
)
def test_plan_estimates_memory_from_config(
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
    ("family", "layers", "times"),
    [
        ("llama", {"num_hidden_layers": 7}, {"model.layers.1": 5}),
        ("gemma3_text", {"num_hidden_layers": 18, "sliding_window": 32,
                         "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3},
         {"model.layers.1": 14, "model.layers.5": 2}),
        ("gpt_neo", {"num_layers": 10, "attention_types": [[["global", "local"], 5]]},
         {"transformer.h.1": 4, "transformer.h.2": 4}),
        ("qwen3_moe", {"num_hidden_layers": 10, "mlp_only_layers": [0, 1, 2]},
         {"model.layers.1": 2, "model.layers.3": 6}),
        ("t5", {"num_layers": 9, "num_decoder_layers": 8},
         {"encoder.block.1": 7, "decoder.block.1": 6}),
    ],
)  # fmt: skip
def test_estimate_from_sampled_layers_matches_all_layers(
    tmp_path: Path, tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch,
    family: str, layers: dict[str, Any], times: dict[str, int],
) -> None:  # fmt: skip
    config = configure(tmp_path, tiny_model_dir(family, **layers), "lora", classes=False)
    if family == "qwen3_moe":
        attention = config.method.model_copy(update={"target_modules": ["q_proj", "v_proj"]})
        config = config.model_copy(update={"method": attention})
    if family == "t5":
        rows = '{"document": "the value of an object", "summary": "a value"}\n' * 8
        (tmp_path / "rows.jsonl").write_text(rows)
        config = config.with_sections(task="summarization")
    run = resolve(config)
    sample = memory.BlockSample.of(run)
    assert sample.times == times
    assert sample.count <= MAX_BLOCKS
    extended = estimate_step_memory(run, MEMORY)
    tree = ModuleTree(build_task_model(run.model.config, run.model.auto_class))
    names = [
        f"{s}.{at}" for s in tree.blocks for at in range(len(list(tree.modules[s].children())))
    ]
    monkeypatch.setattr(memory.BlockSample, "of", lambda _: memory.BlockSample(tuple(names), {}))
    assert extended.peak == pytest.approx(estimate_step_memory(run, MEMORY).peak, rel=0.005)


def test_estimate_with_two_workers(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    config = configure(tmp_path, tiny_model_dir("llama"), "lora", classes=False)
    run = resolve(config)
    one_worker = estimate_step_memory(run, MEMORY)
    two_workers = estimate_step_memory(replace(run, fast=replace(run.fast, workers=2)), MEMORY)
    assert two_workers.parts["weights"] == one_worker.parts["weights"]
    assert two_workers.tokens < one_worker.tokens  # each worker has half of the budget
    assert two_workers.parts["activations"] == pytest.approx(
        one_worker.parts["activations"], rel=0.3
    )


def test_attention_on_gpu_stores_no_weights(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    """Half as many rows of twice the length need as much memory."""
    config = configure(tmp_path, tiny_model_dir("llama"), "lora", False).with_sections(
        model={"dtype": "bfloat16"}
    )
    rows, activations = tmp_path / "rows.jsonl", []
    for times in (1, 2):
        run = resolve(config.with_sections(train={"per_device_train_batch_size": 8 // times}))
        on_gpu = replace(run, model=replace(run.model, device="cuda"))
        activations.append(estimate_step_memory(on_gpu, MEMORY).parts["activations"])
        texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
        rows.write_text("".join(json.dumps({"text": f"{text} {text}"}) + "\n" for text in texts))
    assert activations[1] == pytest.approx(activations[0], rel=0.03)


def test_logit_chunks_scale_with_gpu_memory(tmp_path: Path, tiny_model_dir: ModelDir) -> None:
    config = configure(tmp_path, tiny_model_dir("llama"), "lora", classes=False)
    run = resolve(config)
    on_gpu = replace(run, model=replace(run.model, device="cuda"))
    logits = [estimate_step_memory(on_gpu, size).parts["logits"] for size in (2**33, 2**22)]
    targets = [targets_per_chunk(size, run.model.vocabulary) for size in (2**33, 2**22)]
    assert targets[0] > 2 * targets[1] >= 2 * MIN_TARGETS  # the step has at most 8 · 60 targets
    assert logits[0] > logits[1]


class TestFakeTensor:
    def test_shapes_dtypes_and_strides_match_real_tensors(self) -> None:
        def compute(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                y = functional.linear(x, w)
            z = y.float().view(2, 2, 2, 4).transpose(1, 2)
            attention = functional.scaled_dot_product_attention(z, z, z, is_causal=True)
            return [y, z, attention, attention.softmax(-1)[..., :1]]

        real = compute(torch.randn(2, 2, 3), torch.randn(8, 3))
        fake = compute(new_fake((2, 2, 3), torch.float32), new_fake((8, 3), torch.float32))
        for actual, expected in zip(fake, real, strict=True):
            assert isinstance(actual, FakeTensor)
            assert actual.device.type == "cpu"
            assert (actual.shape, actual.dtype, actual.stride()) == (
                expected.shape, expected.dtype, expected.stride()
            )  # fmt: skip

    def test_indexing_with_real_mask_selects_rows(self) -> None:
        with OperationWatch():
            selected = new_fake((4, 3), torch.float32)[torch.tensor([True, False, True, True])]
        assert selected.shape == (3, 3)

    def test_views_share_their_storage(self) -> None:
        x = new_fake((4, 3), torch.float32)
        assert storage_of(x[1:].t()) is storage_of(x) or (
            storage_of(x[1:].t())._cdata == storage_of(x)._cdata
        )

    def test_cached_operations_match_real_results(self) -> None:
        def compute(x: torch.Tensor, row: torch.Tensor) -> list[torch.Tensor]:
            transposed = x[1:3].t()
            scaled = transposed * 2.0 + row
            scaled[0] += 1
            first, second = scaled.split(2, 0)
            return [transposed, scaled, first, second, scaled.view(torch.int32), x.expand(2, 4, 3)]

        real = compute(torch.randn(4, 3), torch.randn(2))
        for _ in range(2):  # the second time all operations are cached
            x = new_fake((4, 3), torch.float32)
            outputs = compute(x, new_fake((2,), torch.float32))
            for fake, expected in zip(outputs, real, strict=True):
                assert (fake.shape, fake.dtype, fake.stride(), fake.storage_offset()) == (
                    expected.shape, expected.dtype, expected.stride(), expected.storage_offset()
                )  # fmt: skip
                assert storage_of(fake).nbytes() == expected.untyped_storage().nbytes()
            cdata = [storage_of(fake)._cdata for fake in (x, *outputs)]
            assert [cdata.index(pointer) for pointer in cdata] == [0, 0, 2, 2, 2, 2, 0]

    def test_operation_cache_distinguishes_scalar_types_and_arguments(self) -> None:
        x = new_fake((4,), torch.int64)
        assert [(x * factor).dtype for factor in (1, 1.0, 1)] == [
            torch.int64,
            torch.float32,
            torch.int64,
        ]
        assert [x.sum(0, keepdim=keepdim).dim() for keepdim in (False, True, False)] == [0, 1, 0]

    def test_in_place_operation_returns_its_target(self) -> None:
        total = torch.zeros(3)
        original = total
        total += new_fake((3,), torch.float32)
        assert total is original


class TestLiveBytes:
    def test_tensor_is_counted_until_freed(self) -> None:
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

    def test_tensor_added_twice_is_counted_once(self) -> None:
        live = LiveMemoryTracker()
        x = torch.zeros(1000)
        live.add(x, "weights")
        live.add(x, "adapter")
        assert live.total == 4000
        assert live.peaks["forward"] == {"weights": 4000} or live.peaks["forward"]["adapter"]
