"""Tests that tokens per micro-batch are the most that fit in memory by the estimate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from ftlevel.config import TrainConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import Encoded
from ftlevel.fast.plan import FastPlan
from ftlevel.models.hardware import get_free_memory
from ftlevel.training.forecast.fits import Device, fit_run
from ftlevel.training.forecast.memory import StepMemory
from ftlevel.training.forecast.meta_model import ACTIVATIONS, WEIGHTS
from ftlevel.training.plan.run import Run

ROW = 100
FIXED, BYTES_PER_TOKEN, RECOMPUTED_BYTES = 10_000, 100, 20


@dataclass(frozen=True)
class RunStub:
    """The fields of a run that are used."""

    config: TrainConfig
    fast: FastPlan
    model: Any
    data: Any
    choices: list[Choice] = field(default_factory=list)
    recomputes: bool = False
    with_settings = Run.with_settings


def create_run(
    device: str = "cuda", enabled: bool = True, setting: Any = "auto", length: int = ROW,
    **train: Any,
) -> Any:  # fmt: skip
    rows = [Encoded([5] * length, [5] * length, index) for index in range(64)]
    tokens = setting if isinstance(setting, int) else 16 * length
    return RunStub(
        create_config(setting, **train),
        FastPlan(enabled=enabled, tokens=tokens),
        SimpleNamespace(device=device, config=LlamaConfig()),
        SimpleNamespace(train=rows, max_length=length),
    )


def create_config(setting: Any = "auto", **train: Any) -> TrainConfig:
    speed = {"tokens_per_micro_batch": setting}
    train_config = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, **train}
    return TrainConfig.model_validate({"train": train_config, "speed": speed})


@pytest.fixture
def requested_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the model's memory estimate with fixed numbers; return the requested token counts."""
    requests: list[int] = []

    def forecast(_: Device, run: Any) -> StepMemory:
        requests.append(run.fast.tokens)
        tokens = max(ROW, run.fast.tokens // ROW * ROW)  # whole rows
        bytes_per_token = RECOMPUTED_BYTES if run.config.train.recomputes else BYTES_PER_TOKEN
        return StepMemory(
            {WEIGHTS: FIXED, ACTIVATIONS: tokens * bytes_per_token}, "forward", tokens
        )

    monkeypatch.setattr(Device, "forecast", forecast)
    return requests


def fit(memory: int, previous: int | None = None, **run: Any) -> Any:
    """Return the run that fits on a device with `memory` bytes."""
    run_stub = create_run(**run)
    return fit_run(run_stub, Device(run_stub.model.device, "", memory), previous).apply(run_stub)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(ROW, 32 * ROW), (600, 16_384), (20_000, 20_000)],  # a step, the cap, and the longest row
)
def test_gpu_default_is_what_fits_up_to_a_cap(
    length: int, expected: int, requested_tokens: list[int]
) -> None:
    run = fit(10**9, length=length)
    assert (run.fast.tokens, run.config.speed.tokens_per_micro_batch) == (expected, expected)
    assert (run.fast.memory, requested_tokens) == (10**9, [expected])
    assert "auto: " in run.choices[-1].reason


@pytest.mark.parametrize("rows", [15, 9, 2, 1])
def test_largest_fitting_micro_batch_is_found(rows: int, requested_tokens: list[int]) -> None:
    memory = FIXED + int((rows + 0.5) * ROW * BYTES_PER_TOKEN)
    run = fit(memory, gradient_checkpointing=False)
    assert run.fast.tokens // ROW == rows
    assert run.choices[-1].name == "micro-batch"
    assert len(requested_tokens) <= 4


def test_run_that_does_not_fit_is_unchanged(requested_tokens: list[int]) -> None:
    """A step that runs out of memory halves its micro-batches."""
    run = fit(FIXED, gradient_checkpointing=False)
    assert (run.fast, run.choices) == (create_run().fast, [])
    assert requested_tokens


def test_resumed_run_keeps_its_micro_batch(requested_tokens: list[int]) -> None:
    run = fit(10**9, previous=700, gradient_checkpointing=False)
    assert (run.fast.tokens, run.config.speed.tokens_per_micro_batch) == (700, 700)
    assert not requested_tokens


@pytest.mark.parametrize(
    "fields",
    [{"device": "cpu"}, {"enabled": False}, {"shard": "full"}, {"setting": 800}],
)
def test_only_the_default_on_a_gpu_is_sized(
    fields: dict[str, Any], requested_tokens: list[int]
) -> None:
    run = fit(10**9, previous=700, gradient_checkpointing=False, **fields)
    assert run.fast == create_run(**fields).fast
    assert not requested_tokens


def test_checkpointing_is_used_for_small_micro_batches(requested_tokens: list[int]) -> None:
    memory = FIXED + 500 * BYTES_PER_TOKEN
    run = fit(memory)
    assert run.recomputes
    assert run.fast.tokens // ROW == 500 * BYTES_PER_TOKEN // RECOMPUTED_BYTES // ROW - 1
    assert [choice.value for choice in run.choices if "check" in choice.name] == ["all blocks"]
    assert not fit(10**9).recomputes
    assert requested_tokens


@pytest.mark.parametrize(
    ("tokens", "recomputes"), [(400, False), (800, True), (10_000, True)]
)  # with checkpointing, 2,500 fit
def test_checkpointing_is_used_if_given_micro_batch_does_not_fit(
    tokens: int, recomputes: bool, requested_tokens: list[int]
) -> None:
    run = fit(FIXED + 500 * BYTES_PER_TOKEN, setting=tokens)
    assert (run.recomputes, run.fast.tokens) == (recomputes, tokens)
    assert requested_tokens == [tokens] * (1 + recomputes)


@pytest.mark.parametrize(("offload", "shown"), [(False, ""), (True, "host memory")])
def test_requested_checkpointing_is_shown(
    offload: bool, shown: str, requested_tokens: list[int]
) -> None:
    run = fit(10**9, gradient_checkpointing=True, offload_activations=offload)
    (choice,) = (choice for choice in run.choices if "checkpointing" in choice.name)
    assert choice.value == "all blocks"
    assert shown in choice.reason
    assert not run.recomputes
    assert len(requested_tokens) == 1


def test_free_memory_of_control_groups(tmp_path: Path) -> None:
    files = {
        "two": {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 500\n"
                "inactive_file 150"},
        "none": {"memory.max": "max", "memory.current": "700", "memory.stat": "anon 500"},
        "one": {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "950",
                "memory.stat": "total_inactive_file 10"},
    }  # fmt: skip
    for group, contents in files.items():
        (tmp_path / group).mkdir()
        for name, text in contents.items():
            (tmp_path / group / name).write_text(text)
    assert list(get_free_memory(tmp_path / group for group in files)) == [450, 0]
