"""The tokens of a micro-batch are the most that the forecast fits into the memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ftlevel.cli.app import run
from ftlevel.config import TrainConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import ConfigError
from ftlevel.fast.plan import FastPlan
from ftlevel.models.hardware import get_free_memory
from ftlevel.training.forecast import alternatives
from ftlevel.training.forecast.alternatives import fit_batch_size, select_batch_size
from ftlevel.training.forecast.fits import Device
from ftlevel.training.forecast.memory import StepMemory
from ftlevel.training.forecast.meta_model import ACTIVATIONS, WEIGHTS
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes
from ftlevel.world import World

ROW = 100
FIXED, OF_A_TOKEN, RECOMPUTED = 10_000, 100, 20


@dataclass(frozen=True)
class RunOf:
    """The fields of a run that are read."""

    config: TrainConfig
    fast: FastPlan
    model: Any
    data: Any
    choices: list[Choice] = field(default_factory=list)
    with_settings = Run.with_settings


def run_of(device: str = "cpu", enabled: bool = True, **train: Any) -> Any:
    rows = [Encoded([5] * ROW, [5] * ROW, at) for at in range(64)]
    return RunOf(
        config_of(**train),
        FastPlan(enabled=enabled, tokens=1600),
        SimpleNamespace(device=device),
        SimpleNamespace(train=rows, max_length=ROW),
    )


def config_of(**train: Any) -> TrainConfig:
    speed = {"tokens_per_micro_batch": "memory"}
    more = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, **train}
    return TrainConfig.model_validate({"train": more, "speed": speed})


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put a forecast of known numbers in the place of the model's; return what it is asked."""
    asked: list[int] = []

    def forecast(_: Device, run: Any) -> StepMemory:
        asked.append(run.fast.tokens)
        tokens = max(ROW, run.fast.tokens // ROW * ROW)  # whole rows
        each = RECOMPUTED if run.config.train.recomputes else OF_A_TOKEN
        return StepMemory({WEIGHTS: FIXED, ACTIVATIONS: tokens * each}, "forward", tokens)

    monkeypatch.setattr(Device, "forecast", forecast)
    return asked


def tokens_for(memory: int, device: str = "cpu", **train: Any) -> int:
    run = fit_batch_size(run_of(device, **train), memory)
    assert run.config.speed.tokens_per_micro_batch == run.fast.tokens
    assert run.fast.memory == memory
    return run.fast.tokens


def test_what_is_fast_anyhow_is_not_exceeded_on_a_cpu(tried: list[int]) -> None:
    assert tokens_for(10**9) == 1600
    assert tried == [1600]


def test_a_gpu_takes_a_whole_step_at_once_where_it_fits(tried: list[int]) -> None:
    assert tokens_for(10**9, "cuda") == 3200
    assert tried == [3200]


@pytest.mark.parametrize("rows", [15, 9, 2, 1])
def test_the_most_rows_that_fit_are_found(rows: int, tried: list[int]) -> None:
    memory = FIXED + int((rows + 0.5) * ROW * OF_A_TOKEN)
    assert tokens_for(memory) // ROW == rows
    assert len(tried) <= 3


@pytest.mark.parametrize("memory", [FIXED - 1, FIXED + ROW * OF_A_TOKEN - 1])
def test_a_row_alone_that_does_not_fit_is_refused(memory: int, tried: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"--auto-micro-batch: .* Try --gradient-checkpointing"):
        tokens_for(memory)
    assert tried


def test_a_gpu_recomputes_before_micro_batches_become_slow(tried: list[int]) -> None:
    memory = FIXED + 500 * OF_A_TOKEN
    assert tokens_for(memory, "cuda", gradient_checkpointing=False) // ROW == 4
    assert tokens_for(memory, "cuda") // ROW == 500 * OF_A_TOKEN // RECOMPUTED // ROW - 1
    assert tried


def test_a_plain_step_has_no_micro_batches() -> None:
    with pytest.raises(ConfigError, match=r"needs the fast step.*--no-fast"):
        fit_batch_size(run_of(enabled=False), 10**9)


def test_a_base_that_is_shared_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not support --shard.*--tokens-per-micro-batch N"):
        fit_batch_size(run_of(shard="full"), 10**9)


def test_a_run_that_goes_on_keeps_its_tokens(tried: list[int]) -> None:
    run = select_batch_size(run_of(), Processes(), 700)
    assert (run.fast.tokens, run.config.speed.tokens_per_micro_batch) == (700, 700)
    assert not tried


def test_a_limit_needs_something_that_is_fitted_to_it() -> None:
    with pytest.raises(ValueError, match="memory_gib=2 is what --auto-micro-batch fits"):
        TrainConfig.model_validate({"speed": {"memory_gib": 2}})


def test_what_the_run_holds_already_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    wish = TrainConfig.model_validate(
        {"speed": {"tokens_per_micro_batch": "memory", "memory_gib": 64}}
    )
    monkeypatch.setattr(alternatives, "free_memory_bytes", lambda _: 8 * 2**30)
    beside = alternatives.CPU_OVERHEAD_BYTES
    assert alternatives.get_available_memory(wish.speed, "cpu", Processes()) == 8 * 2**30 - beside
    assert (
        alternatives.get_available_memory(
            config_of().speed, "cpu", Processes(World(size=4, local_size=2))
        )
        == 4 * 2**30 - beside
    )
    monkeypatch.setattr(alternatives, "free_memory_bytes", lambda _: 128 * 2**30)
    assert alternatives.get_available_memory(wish.speed, "cpu", Processes()) < 64 * 2**30 - beside
    assert alternatives.get_available_memory(wish.speed, "cuda", Processes()) == 64 * 2**30


def test_a_control_group_leaves_what_is_below_its_limit(tmp_path: Path) -> None:
    files = {
        "two": {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 500\n"
                "inactive_file 150"},
        "none": {"memory.max": "max", "memory.current": "700", "memory.stat": "anon 500"},
        "one": {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "950",
                "memory.stat": "total_inactive_file 10"},
    }  # fmt: skip
    for group, its in files.items():
        (tmp_path / group).mkdir()
        for name, text in its.items():
            (tmp_path / group / name).write_text(text)
    assert list(get_free_memory(tmp_path / group for group in files)) == [450, 0]


@pytest.mark.slow
def test_a_run_in_less_memory_has_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--max-samples", "24", "--max-length", "128", "--overlong", "drop",
               "--batch-size", "8", "--max-steps", "4", "--logging-steps", "1", "--save-steps", "2",
               "--dtype", "float32", "--no-verify-fast",
               "--set", "data.max_eval_samples=8"]  # fmt: skip

    def losses(name: str) -> list[float]:
        records = map(json.loads, Path(name, "metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if "loss" in record]

    assert run([*command, "--output-dir", "whole"]) == 0
    whole = json.loads(Path("whole/summary.json").read_text())["speed"]
    config = yaml.safe_load(Path("whole/config.yaml").read_text())
    assert config["speed"]["tokens_per_micro_batch"] == "auto"
    monkeypatch.setattr(alternatives, "get_available_memory", lambda *_: 30 * 2**20)
    capsys.readouterr()
    assert run([*command, "--auto-micro-batch", "--output-dir", "parts"]) == 0
    assert "--auto-micro-batch: 0.0" in capsys.readouterr().out
    parts = json.loads(Path("parts/summary.json").read_text())["speed"]
    assert parts["tokens_per_micro_batch"] < whole["tokens_per_micro_batch"]
    assert (whole["chosen_for_bytes"], parts["chosen_for_bytes"]) == (None, 30 * 2**20)
    assert "for 0.03 GiB." in Path("parts/README.md").read_text()
    config = yaml.safe_load(Path("parts/config.yaml").read_text())
    assert config["speed"]["tokens_per_micro_batch"] == parts["tokens_per_micro_batch"]
    assert losses("parts") == pytest.approx(losses("whole"), rel=1e-4)

    shutil.copytree("parts", "broken")
    shutil.rmtree("broken/checkpoints/checkpoint-4")
    Path("broken/summary.json").unlink()
    monkeypatch.setattr(alternatives, "get_available_memory", lambda *_: 2**33)
    assert run([*command, "--auto-micro-batch", "--output-dir", "broken", "--resume"]) == 0
    assert losses("broken") == losses("parts")
