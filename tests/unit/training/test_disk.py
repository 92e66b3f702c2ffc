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
from ftlevel.errors import RunError
from ftlevel.training.disk import explain_disk_errors

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
        pytest.raises(RunError, match=r"disk is full.*no whole checkpoint"),
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
    assert f"{whole} is whole" in message
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
