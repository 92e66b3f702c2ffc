"""Tests that tokens per micro-batch are the most that fit in memory by the estimate."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from ftlevel.cli.app import run
from ftlevel.config import TrainConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import ConfigError
from ftlevel.fast.plan import FastPlan
from ftlevel.models.hardware import get_free_memory
from ftlevel.training.forecast import alternatives
from ftlevel.training.forecast.alternatives import (
    fit_batch_size,
    get_max_rows,
    is_sized_by_memory,
    select_batch_size,
)
from ftlevel.training.forecast.fits import Device
from ftlevel.training.forecast.memory import StepMemory, get_peak
from ftlevel.training.forecast.meta_model import ACTIVATIONS, WEIGHTS
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes
from ftlevel.world import World

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
    with_settings = Run.with_settings


def create_run(
    device: str = "cpu", enabled: bool = True, setting: str = "memory", length: int = ROW,
    **train: Any,
) -> Any:  # fmt: skip
    rows = [Encoded([5] * length, [5] * length, index) for index in range(64)]
    return RunStub(
        create_config(setting, **train),
        FastPlan(enabled=enabled, tokens=16 * length),
        SimpleNamespace(device=device, config=LlamaConfig()),
        SimpleNamespace(train=rows, max_length=length),
    )


def create_config(setting: str = "memory", **train: Any) -> TrainConfig:
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


def fit_tokens(memory: int, device: str = "cpu", **train: Any) -> int:
    run = fit_batch_size(create_run(device, **train), memory)
    assert run.config.speed.tokens_per_micro_batch == run.fast.tokens
    assert run.fast.memory == memory
    return run.fast.tokens


def test_cpu_default_is_not_exceeded(requested_tokens: list[int]) -> None:
    assert fit_tokens(10**9) == 1600
    assert requested_tokens == [1600]


def test_gpu_uses_whole_step_if_it_fits(requested_tokens: list[int]) -> None:
    assert fit_tokens(10**9, "cuda") == 3200
    assert requested_tokens == [3200]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(ROW, 32 * ROW), (600, 16_384), (20_000, 20_000)],  # a step, the cap, and the longest row
)
def test_gpu_default_is_what_fits_up_to_a_cap(
    length: int, expected: int, requested_tokens: list[int]
) -> None:
    run = fit_batch_size(create_run("cuda", setting="auto", length=length), 10**9)
    assert (run.fast.tokens, run.config.speed.tokens_per_micro_batch) == (expected, expected)
    assert (run.fast.memory, requested_tokens) == (10**9, [expected])
    assert "auto: " in run.choices[-1].reason


def test_gpu_default_is_as_large_as_free_memory_allows(
    requested_tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FIXED + 900 * BYTES_PER_TOKEN  # four fifths of what is free
    monkeypatch.setattr(alternatives, "free_memory_bytes", lambda device: memory * 5 // 4 + 1)
    run = create_run("cuda", setting="auto", gradient_checkpointing=False)
    sized = select_batch_size(run, Processes(), None)
    assert sized.fast.tokens // ROW == 8
    resumed = select_batch_size(run, Processes(), sized.fast.tokens)
    assert resumed.fast.tokens == sized.fast.tokens
    monkeypatch.setattr(alternatives, "free_memory_bytes", lambda device: FIXED)
    unfit = select_batch_size(run, Processes(), None)  # no row fits by the estimate
    assert (unfit.fast, unfit.choices) == (run.fast, [])
    assert unfit.config.speed.tokens_per_micro_batch == run.fast.tokens, "known on resume"
    assert requested_tokens


@pytest.mark.parametrize(
    ("device", "setting", "fields", "expected"),
    [("cuda", "auto", {}, True), ("cpu", "auto", {}, False), ("cpu", "memory", {}, True),
     ("cuda", "auto", {"enabled": False}, False), ("cuda", "auto", {"shard": "full"}, False),
     ("cuda", "memory", {"shard": "full"}, True)],
)  # fmt: skip
def test_default_is_sized_by_memory_on_a_gpu_only(
    device: str, setting: str, fields: dict[str, Any], expected: bool
) -> None:
    assert is_sized_by_memory(create_run(device, setting=setting, **fields)) is expected


@pytest.mark.parametrize("rows", [15, 9, 2, 1])
def test_largest_fitting_micro_batch_is_found(rows: int, requested_tokens: list[int]) -> None:
    memory = FIXED + int((rows + 0.5) * ROW * BYTES_PER_TOKEN)
    assert fit_tokens(memory) // ROW == rows
    assert len(requested_tokens) <= 3


@pytest.mark.parametrize("memory", [FIXED - 1, FIXED + ROW * BYTES_PER_TOKEN - 1])
def test_single_row_that_does_not_fit_raises(memory: int, requested_tokens: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"--auto-micro-batch: .* Try --gradient-checkpointing"):
        fit_tokens(memory)
    assert requested_tokens


def test_gpu_enables_checkpointing_for_small_micro_batches(requested_tokens: list[int]) -> None:
    memory = FIXED + 500 * BYTES_PER_TOKEN
    assert fit_tokens(memory, "cuda", gradient_checkpointing=False) // ROW == 4
    assert fit_tokens(memory, "cuda") // ROW == 500 * BYTES_PER_TOKEN // RECOMPUTED_BYTES // ROW - 1
    assert requested_tokens


def test_auto_micro_batch_without_fast_step_raises() -> None:
    with pytest.raises(ConfigError, match=r"needs the fast step.*--no-fast"):
        fit_batch_size(create_run(enabled=False), 10**9)


def test_auto_micro_batch_with_sharding_raises() -> None:
    with pytest.raises(
        ConfigError, match=r"cannot be used with --shard.*--tokens-per-micro-batch N"
    ):
        fit_batch_size(create_run(shard="full"), 10**9)


def test_resumed_run_keeps_tokens_per_micro_batch(requested_tokens: list[int]) -> None:
    run = select_batch_size(create_run(), Processes(), 700)
    assert (run.fast.tokens, run.config.speed.tokens_per_micro_batch) == (700, 700)
    assert not requested_tokens


def test_memory_limit_without_auto_micro_batch_raises() -> None:
    with pytest.raises(ValueError, match="memory_gib=2 needs --tokens-per-micro-batch memory"):
        TrainConfig.model_validate({"speed": {"memory_gib": 2}})


def test_available_memory_excludes_overhead_and_other_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrainConfig.model_validate(
        {"speed": {"tokens_per_micro_batch": "memory", "memory_gib": 64}}
    )
    monkeypatch.setattr(alternatives, "free_memory_bytes", lambda _: 8 * 2**30)
    overhead = alternatives.CPU_OVERHEAD_BYTES
    assert (
        alternatives.get_available_memory(config.speed, "cpu", Processes()) == 8 * 2**30 - overhead
    )
    assert (
        alternatives.get_available_memory(
            create_config().speed, "cpu", Processes(World(size=4, local_size=2))
        )
        == 4 * 2**30 - overhead
    )
    monkeypatch.setattr(alternatives, "free_memory_bytes", lambda _: 128 * 2**30)
    assert (
        alternatives.get_available_memory(config.speed, "cpu", Processes()) < 64 * 2**30 - overhead
    )
    assert alternatives.get_available_memory(config.speed, "cuda", Processes()) == 64 * 2**30


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


@pytest.mark.slow
def test_run_with_less_memory_has_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--max-samples", "24", "--max-length", "128", "--overlong", "drop",
               "--batch-size", "8", "--max-steps", "4", "--logging-steps", "1", "--save-steps", "2",
               "--dtype", "float32", "--no-verify-fast",
               "--set", "data.max_eval_samples=8"]  # fmt: skip

    def load_losses(name: str) -> list[float]:
        records = map(json.loads, Path(name, "metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if "loss" in record]

    assert run([*command, "--output-dir", "whole"]) == 0
    full = json.loads(Path("whole/summary.json").read_text())["speed"]
    config = yaml.safe_load(Path("whole/config.yaml").read_text())
    assert config["speed"]["tokens_per_micro_batch"] == "auto"
    monkeypatch.setattr(alternatives, "get_available_memory", lambda *_: 30 * 2**20)
    capsys.readouterr()
    assert run([*command, "--auto-micro-batch", "--output-dir", "parts"]) == 0
    assert "--auto-micro-batch: 0.0" in capsys.readouterr().out
    parts = json.loads(Path("parts/summary.json").read_text())["speed"]
    assert parts["tokens_per_micro_batch"] < full["tokens_per_micro_batch"]
    assert (full["chosen_for_bytes"], parts["chosen_for_bytes"]) == (None, 30 * 2**20)
    assert "for 0.03 GiB." in Path("parts/README.md").read_text()
    config = yaml.safe_load(Path("parts/config.yaml").read_text())
    assert config["speed"]["tokens_per_micro_batch"] == parts["tokens_per_micro_batch"]
    assert load_losses("parts") == pytest.approx(load_losses("whole"), rel=1e-4)

    shutil.copytree("parts", "broken")
    shutil.rmtree("broken/checkpoints/checkpoint-4")
    Path("broken/summary.json").unlink()
    monkeypatch.setattr(alternatives, "get_available_memory", lambda *_: 2**33)
    assert run([*command, "--auto-micro-batch", "--output-dir", "broken", "--resume"]) == 0
    assert load_losses("broken") == load_losses("parts")


def test_most_rows_fit_in_every_phase() -> None:
    """The peak in the optimizer step has no activations, and does not depend on the rows."""
    moments = {
        "forward": {WEIGHTS: 100, ACTIVATIONS: 40},
        "backward": {WEIGHTS: 100, ACTIVATIONS: 80},
        "optimizer step": {WEIGHTS: 300},
    }
    step = get_peak(moments, 64)
    assert step.at == "optimizer step"
    assert get_max_rows(step, 500, batch_size=4) == 4 + (500 - 180) // 20
    assert get_max_rows(step, 299, batch_size=4) == 0
