"""Tests that a failed write ends the run with one line: reason and last valid checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.files import check_writable
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import TrainerConfig
from ftlevel.errors import ConfigError, RunError
from ftlevel.training.saving import (
    check_checkpoint_space,
    check_disk_space,
    checkpoint_bytes,
    explain_disk_errors,
)

FULL_DEVICE = Path("/dev/full")
pytestmark = pytest.mark.skipif(
    not FULL_DEVICE.exists(), reason="needs a device that is always full"
)


def write_with_python() -> None:
    with FULL_DEVICE.open("w") as file:
        file.write("a line")


def write_with_torch() -> None:
    torch.save({"a": torch.zeros(1000)}, FULL_DEVICE)


def write_with_safetensors(missing: Path = Path("/proc/no-such/file")) -> None:
    save_file({"a": torch.zeros(10)}, missing)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.checkpoints.mkdir(parents=True)
    return directory


@pytest.fixture
def set_free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the free bytes of every disk."""
    return lambda free: monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(free=free)
    )


def test_full_disk_error_of_python_is_explained(run):
    message = r"disk is full.*no valid checkpoint"
    with pytest.raises(RunError, match=message), explain_disk_errors(run):
        write_with_python()


def test_torch_error_without_free_space_is_explained_as_full_disk(run, set_free):
    set_free(4096)
    complete = run.checkpoints / "checkpoint-2"
    complete.mkdir()
    (complete / "weights").write_text("2")
    checkpoints.certify(complete)
    (run.checkpoints / "checkpoint-4").mkdir()
    with pytest.raises(RunError) as caught, explain_disk_errors(run):
        write_with_torch()
    message = str(caught.value)
    assert "disk is full" in message
    assert f"{complete} is complete" in message
    assert f"--output-dir {run.path} --resume" in message
    assert "\n" not in message


@pytest.mark.parametrize("write", [write_with_torch, write_with_safetensors])
def test_other_write_errors_are_reported_unchanged(run, write):
    message = r"cannot be written: (?!its disk)"
    with pytest.raises(RunError, match=message), explain_disk_errors(run):
        write()


def test_non_write_errors_are_not_changed(run):
    with pytest.raises(RuntimeError, match="shapes differ"), explain_disk_errors(run):
        raise RuntimeError("shapes differ")


def test_errors_of_other_files_are_not_changed(run, tmp_path):
    with pytest.raises(PermissionError), explain_disk_errors(run):
        raise PermissionError(13, "Permission denied", str(tmp_path / "rows.jsonl"))
    with pytest.raises(RunError, match="cannot be written: Permission"), explain_disk_errors(run):
        raise PermissionError(13, "Permission denied", str(run.path / "metrics.jsonl"))


def test_errors_of_linked_checkpoints_are_explained(run, tmp_path):
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to(tmp_path, target_is_directory=True)
    path = run.checkpoints / "checkpoint-2"
    with pytest.raises(RunError, match="its disk is full"), explain_disk_errors(run):
        raise OSError(28, "No space left on device", str(path))


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"save_steps": 2}, 3),  # two kept, and the one being written
        ({"save_steps": 9}, 1),
        ({"save_strategy": "epoch", "num_train_epochs": 2, "save_total_limit": 4}, 2),
        ({"save_strategy": "best"}, 3),
        ({"save_strategy": "no"}, 0),
        ({}, 1),  # saved by time
    ],
)
def test_run_without_space_for_checkpoints_raises(tmp_path, set_free, settings, count):
    model, train = torch.nn.Linear(99, 10), TrainerConfig.model_validate(settings)
    checkpoint_size = 1000 * (4 + 8)  # a weight and its two AdamW states
    output_dir = tmp_path / "runs" / "new"
    set_free(count * checkpoint_size)
    check_disk_space(output_dir, train, model, 9)
    if count == 0:
        return
    set_free(count * checkpoint_size - 1)
    with pytest.raises(ConfigError, match=rf"{output_dir}: its disk has .* {count} x 12\.0 kB"):
        check_disk_space(output_dir, train, model, 9)
    output_dir.mkdir(parents=True)
    (output_dir / "of the run that is replaced").write_text("x")
    check_disk_space(output_dir, train, model, 9)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no procfs")
def test_file_system_without_space_is_not_writable():
    with pytest.raises(ConfigError, match="--output-dir: /proc cannot be written"):
        check_writable("--output-dir", Path("/proc/x"))


@pytest.mark.parametrize(
    ("optim", "states"),
    [("adamw_torch", 2), ("ademamix", 3), ("lion_32bit", 1), ("adagrad", 1), ("sgd", 0)],
)
def test_checkpoint_size_includes_optimizer_states(optim, states):
    assert checkpoint_bytes(torch.nn.Linear(99, 10), optim) == 1000 * 4 * (1 + states)


def test_checkpoint_without_space_raises(run, set_free):
    model = torch.nn.Linear(99, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(99)).sum().backward()
    optimizer.step()
    set_free(12_008)
    check_checkpoint_space(run, model, optimizer)
    set_free(12_007)
    with pytest.raises(RunError, match=r"needs about 12\.0 kB.*no valid checkpoint"):
        check_checkpoint_space(run, model, optimizer)
