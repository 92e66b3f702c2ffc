"""A run that cannot be written ends in one line that says why, and what is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import TrainerConfig
from ftlevel.errors import ConfigError, RunError
from ftlevel.training.saving import (
    check_checkpoint_space,
    check_disk_space,
    checkpoint_bytes,
    explain_disk_errors,
)

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")


def by_python() -> None:
    with FULL.open("w") as file:
        file.write("a line")


def by_torch() -> None:
    torch.save({"a": torch.zeros(1000)}, FULL)


def by_safetensors(missing: Path = Path("/proc/no-such/file")) -> None:
    save_file({"a": torch.zeros(10)}, missing)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.checkpoints.mkdir(parents=True)
    return directory


def test_python_says_that_the_disk_is_full(run: RunDirectory) -> None:
    with (
        pytest.raises(RunError, match=r"disk is full.*no valid checkpoint"),
        explain_disk_errors(run),
    ):
        by_python()


def test_torch_is_believed_to_mean_a_full_disk_where_nothing_is_free(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    whole = run.checkpoints / "checkpoint-2"
    whole.mkdir()
    (whole / "weights").write_text("2")
    checkpoints.certify(whole)
    (run.checkpoints / "checkpoint-4").mkdir()
    with pytest.raises(RunError) as caught, explain_disk_errors(run):
        by_torch()
    message = str(caught.value)
    assert "disk is full" in message
    assert f"{whole} is complete" in message
    assert f"--output-dir {run.path} --resume" in message
    assert "\n" not in message


@pytest.mark.parametrize("write", [by_torch, by_safetensors])
def test_another_failure_of_a_writer_is_told_as_it_is(
    run: RunDirectory, write: Callable[[], None]
) -> None:
    with (
        pytest.raises(RunError, match=r"cannot be written: (?!its disk)"),
        explain_disk_errors(run),
    ):
        write()


def test_other_errors_pass(run: RunDirectory) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), explain_disk_errors(run):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"save_steps": 2}, 3),  # two that are kept, and the one that is written
        ({"save_steps": 9}, 1),
        ({"save_strategy": "epoch", "num_train_epochs": 2, "save_total_limit": 4}, 2),
        ({"save_strategy": "best"}, 3),
        ({}, 1),  # by the clock
    ],
)
def test_a_run_begins_where_its_checkpoints_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], count: int
) -> None:
    model, train = torch.nn.Linear(99, 10), TrainerConfig.model_validate(settings)
    one = 1000 * (4 + 8)  # a weight, and what AdamW keeps of it
    where = tmp_path / "runs" / "new"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=count * one))
    check_disk_space(where, train, model, 9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=count * one - 1))
    with pytest.raises(ConfigError, match=rf"{where}: its disk has .* {count} x 0\.00 GB"):
        check_disk_space(where, train, model, 9)
    where.mkdir(parents=True)
    (where / "of the run that is replaced").write_text("x")
    check_disk_space(where, train, model, 9)


@pytest.mark.parametrize(
    ("optim", "states"),
    [("adamw_torch", 2), ("ademamix", 3), ("lion_32bit", 1), ("adagrad", 1), ("sgd", 0)],
)
def test_a_checkpoint_has_the_states_of_its_optimizer(optim: str, states: int) -> None:
    assert checkpoint_bytes(torch.nn.Linear(99, 10), optim) == 1000 * 4 * (1 + states)


def test_a_run_without_checkpoints_needs_no_room_for_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    check_disk_space(
        tmp_path / "new", TrainerConfig(save_strategy="no"), torch.nn.Linear(99, 10), 9
    )


def test_a_checkpoint_is_begun_where_it_has_room(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(99, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(99)).sum().backward()
    optimizer.step()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_008))
    check_checkpoint_space(run, model, optimizer)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_007))
    with pytest.raises(RunError, match=r"needs about 0\.0 MB.*no valid checkpoint"):
        check_checkpoint_space(run, model, optimizer)
