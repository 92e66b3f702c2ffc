"""Locking of a run directory: one run at a time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftlevel.artifacts.files import atomic_directory, atomic_files, lock_dir
from ftlevel.artifacts.run_directory import check_lock, check_output, open_run
from ftlevel.config import OutputConfig
from ftlevel.errors import ConfigError
from ftlevel.events import NullListener
from ftlevel.training.resume import ResumeState, open_or_resume

LOCK_SCRIPT = """
import sys, time
from pathlib import Path
from ftlevel.artifacts.files import lock_dir
with lock_dir(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_directory_is_locked_until_process_is_killed(tmp_path):
    run, _ = open_run(tmp_path / "run", "x", overwrite=False)
    run.save_config("task: text-generation\n")
    process = subprocess.Popen(
        [sys.executable, "-c", LOCK_SCRIPT, run.path], stdout=subprocess.PIPE, text=True
    )
    owner = f" (process {process.pid})" if sys.platform == "linux" else ""
    message = re.escape(f"another run is writing to it{owner}. Wait")
    try:
        assert process.stdout.readline() == "held\n"
        for overwrite, resume in ((True, False), (False, True)):
            with pytest.raises(ConfigError, match=message):
                check_output(run.path, overwrite=overwrite, resume=resume)
        with pytest.raises(ConfigError, match="another run is writing to it"):
            open_run(run.path, "x", overwrite=True)
        assert (run.path / "config.yaml").is_file()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    check_output(run.path, overwrite=False, resume=True)
    names = sorted(path.name for path in run.path.iterdir())
    assert names == [".ftlevel.json", "checkpoints", "config.yaml"]


def test_directory_of_started_run_is_rejected(tmp_path):
    check_output(tmp_path / "run", overwrite=False, resume=False)
    open_run(tmp_path / "run", "x", overwrite=False)
    message = r"another run has started in it\. Choose another directory\."
    with pytest.raises(ConfigError, match=message):
        open_run(tmp_path / "run", "x", overwrite=False)


def test_directory_that_cannot_be_created_raises():
    with pytest.raises(ConfigError, match="--output-dir /proc/run cannot be created"):
        open_run(Path("/proc/run"), "x", overwrite=False)


def test_shared_lock_allows_checks_but_not_exclusive_lock(tmp_path):
    with lock_dir(tmp_path), pytest.raises(ConfigError):
        check_lock(tmp_path)
    with lock_dir(tmp_path, shared=True):  # as another process of the run does
        check_lock(tmp_path)
        with pytest.raises(ConfigError, match="another run is writing"), lock_dir(tmp_path):
            pass


@pytest.mark.parametrize("write", [atomic_directory, atomic_files])
def test_two_commands_do_not_share_an_output(tmp_path, write):
    out = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()  # left by a killed process
    with write(out) as partial:
        (partial / "out").write_text("first")
        message = r"\.out\.partial: another command is writing to it"
        with pytest.raises(ConfigError, match=message), write(out):
            pass
    assert (out if out.is_file() else out / "out").read_text() == "first"


def test_second_resume_leaves_checkpoints_of_first(tmp_path):
    """Both found checkpoint-2; the first has saved checkpoint-4 while the second loaded weights."""
    run, _ = open_run(tmp_path / "run", "x", overwrite=False)
    newer, resumed = (run.checkpoints / f"checkpoint-{step}" for step in (4, 2))
    newer.mkdir()
    output = OutputConfig(dir=run.path, resume=True)
    second: Any = SimpleNamespace(config=SimpleNamespace(output=output))
    with lock_dir(run.path), pytest.raises(ConfigError, match="another run is writing to it"):
        open_or_resume(second, ResumeState(checkpoint=resumed), NullListener())
    with pytest.raises(ConfigError, match="another run has replaced checkpoint-2 meanwhile"):
        open_or_resume(second, ResumeState(checkpoint=resumed), NullListener())
    assert list(run.checkpoints.iterdir()) == [newer]
