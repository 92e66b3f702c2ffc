"""A fast step that is not the plain one is disabled, and the run trains the plain step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import ranks
from ftlevel import TrainConfig, train
from ftlevel.errors import RunError
from ftlevel.events import NullListener
from ftlevel.fast.fused_lora import FusedLoraFunction
from gpu_sim.commands import write_files
from run_files import ModelDir

pytestmark = pytest.mark.slow


class Warnings(NullListener):
    """Collects the warnings of a run."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


def plant_backward(argument: int, factor: float) -> None:
    """Multiply the gradient of LoRA's A (argument 2) or B (3) by `factor` in fused layers."""
    original = FusedLoraFunction.backward

    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        results = list(original(ctx, *gradients))
        results[argument] = None if results[argument] is None else results[argument] * factor
        return tuple(results)

    FusedLoraFunction.backward = staticmethod(backward)  # type: ignore[assignment]


def plant_forward(factor: float) -> None:
    """Multiply the update of fused LoRA layers by `factor`."""
    original = FusedLoraFunction.forward

    def forward(ctx: Any, x: Any, dropped: Any, a: Any, b: Any, bias: Any, weight: Any,
                scaling: float, *others: Any) -> Any:  # fmt: skip
        return original(ctx, x, dropped, a, b, bias, weight, factor * scaling, *others)

    FusedLoraFunction.forward = staticmethod(forward)  # type: ignore[assignment]


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the fused LoRA function after the test."""
    for name in ("forward", "backward"):
        monkeypatch.setattr(FusedLoraFunction, name, getattr(FusedLoraFunction, name))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("rows"))


def configure(model: Path, dataset: str, out: Path, **sections: Any) -> TrainConfig:
    train_section = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4,
        "logging_steps": 1, **sections.pop("train", {}),
    }  # fmt: skip
    return TrainConfig.model_validate({
        "model": {"name_or_path": str(model), "dtype": "float32"}, "method": {"kind": "lora"},
        "data": {"dataset": dataset, "validation_split": 0.2}, "train": train_section,
        "output": {"dir": str(out)}, **sections,
    })  # fmt: skip


def read(out: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return losses, gradient norms and evaluations by step, and the adapter's weights."""
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    kept = [
        {k: v for k, v in record.items() if k in ("step", "loss", "grad_norm", "eval_loss")}
        for record in records
    ]
    return kept, load_file(out / "adapter/adapter_model.safetensors")


def assert_equal_runs(out: Path, expected: Path) -> None:
    (records, weights), (expected_records, expected_weights) = read(out), read(expected)
    assert records == expected_records
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())


TASKS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "text": ("text-generation", "llama", "sft", {}),
    "summarization": ("summarization", "t5", "summary", {}),
    "tags": ("token-classification", "bert", "tags", {}),
    "preference": ("preference", "llama", "preference", {}),
    "kto": ("preference", "llama", "kto", {"preference": {"loss": "kto"}}),
    "rl": ("rl", "llama", "rl", {"rl": {
        "num_generations": 4, "max_completion_length": 8, "check_groups": 0}}),
    "embedding": ("embedding", "bert", "pairs", {}),
    "reranking": ("reranking", "bert", "ranked", {}),
}  # fmt: skip


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", TASKS)
def test_run_trains_the_plain_step(
    name: str, files: dict[str, str], tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    task, family, rows, sections = TASKS[name]
    model, sections = tiny_model_dir(family), {"task": task, **sections}
    if task == "rl":
        sections["rl"] = {**sections["rl"], "reward": f"{files['rewards']}:length"}
    train(configure(model, files[rows], tmp_path / "plain", speed={"fast": False}, **sections))
    plant_backward(2, 0.0)
    listener = Warnings()
    result = train(configure(model, files[rows], tmp_path / "run", **sections), listener=listener)
    reason = result.summary["speed"]["reason"]
    assert result.summary["speed"] == {"fast": False, "reason": reason}
    assert "lora_A differ by 1 in float32 (rounding explains " in reason
    warning = f"fast step disabled: {reason}; training with the plain step. Please report this"
    assert sum(text.startswith(warning) for text in listener.texts) == 1
    assert_equal_runs(tmp_path / "run", tmp_path / "plain")
    assert "fast: true" in (tmp_path / "run/config.yaml").read_text(), "as configured"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(lambda: plant_backward(2, -1.0), id="A × -1"),
        pytest.param(lambda: plant_backward(2, 1.04), id="A × 1.04"),
        pytest.param(lambda: plant_backward(3, 1.04), id="B × 1.04"),
        pytest.param(lambda: plant_forward(2.0), id="forward × 2"),
    ],
)
def test_every_fault_is_detected(
    plant: Callable[[], None], files: dict[str, str], tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    model = tiny_model_dir("llama")
    train(configure(model, files["sft"], tmp_path / "plain", speed={"fast": False}))
    plant()
    result = train(configure(model, files["sft"], tmp_path / "run"))
    assert result.summary["speed"]["fast"] is False
    assert_equal_runs(tmp_path / "run", tmp_path / "plain")
    strict = configure(model, files["sft"], tmp_path / "strict", speed={"verify": True})
    with pytest.raises(RunError, match="--verify-fast: the fast step is not the plain one"):
        train(strict)
    assert not (tmp_path / "strict").exists()


@pytest.mark.usefixtures("restored")
def test_step_that_fails_is_disabled(
    files: dict[str, str], tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(FusedLoraFunction, "backward", staticmethod(fail))
    result = train(configure(tiny_model_dir("llama"), files["sft"], tmp_path / "run"))
    assert result.summary["speed"]["reason"] == "it fails (no such kernel)"
    assert result.summary["steps"] == 4


@pytest.mark.usefixtures("restored")
def test_plain_objective_that_fails_again_stops_the_run(
    files: dict[str, str], tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain step of embedding models is the Trainer's own: there is no plainer one."""
    from ftlevel.extras.retrieval.whole_step import WholeStep

    original = WholeStep._loss

    def wrong_loss(*arguments: Any) -> Any:
        loss, grads = original(*arguments)
        return loss, [2 * grad for grad in grads]

    monkeypatch.setattr(WholeStep, "_loss", wrong_loss)
    config = configure(tiny_model_dir("bert"), files["pairs"], tmp_path / "run", task="embedding")
    with pytest.raises(RunError, match="the fast step is not the plain one"):
        train(config)


class StopError(Exception):
    """Ends a run like a kill."""


class StopAtThirdStep(TrainerCallback):
    """Raises StopError after three steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise StopError


@pytest.mark.usefixtures("restored")
def test_resumed_run_trains_the_plain_step_without_a_check(
    files: dict[str, str], tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, saving = tiny_model_dir("llama"), {"save_steps": 1}
    sound = FusedLoraFunction.backward
    plant_backward(2, -1.0)
    train(configure(model, files["sft"], tmp_path / "whole", train=saving))
    stopping = configure(model, files["sft"], tmp_path / "run", train=saving)

    with pytest.raises(StopError):
        train(stopping, callbacks=[StopAtThirdStep()])
    monkeypatch.setattr(FusedLoraFunction, "backward", staticmethod(sound))
    listener = Warnings()
    resumed = stopping.with_sections(output=stopping.output.model_copy(update={"resume": True}))
    result = train(resumed, listener=listener)
    assert result.summary["speed"]["fast"] is False
    assert any(
        text.startswith("fast step disabled when the run started") for text in listener.texts
    )
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def train_with_fault_in_rank_1(
    rank: int, model: Path, dataset: str, out: Path, shard: str, fast: bool
) -> None:
    if rank == 1:
        plant_backward(2, -1.0)
    config = configure(model, dataset, out, train={"shard": shard}, speed={"fast": fast})
    train(config, listener=NullListener())


@pytest.mark.parametrize("shard", ["none", "full"])
def test_all_processes_train_the_plain_step(
    shard: str, files: dict[str, str], tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    for name, fast in (("plain", False), ("run", True)):
        arguments = (tiny_model_dir("llama"), files["sft"], tmp_path / name, shard, fast)
        both = ranks.start(train_with_fault_in_rank_1, [(rank, *arguments) for rank in (0, 1)])
        assert ranks.end(both, 120) == [0, 0]
    assert_equal_runs(tmp_path / "run", tmp_path / "plain")
    speed = json.loads((tmp_path / "run/summary.json").read_text())["speed"]
    assert speed["fast"] is False
    assert "lora_A differ by 2 in float32" in speed["reason"]
