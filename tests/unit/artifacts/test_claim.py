"""One run at a time in a directory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ftlevel.artifacts.run_directory import check_lock, check_output, lock_dir, open_run
from ftlevel.errors import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from ftlevel.artifacts.run_directory import lock_dir
with lock_dir(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_directory_is_held_until_its_process_is_killed(tmp_path: Path) -> None:
    run, _ = open_run(tmp_path / "run", "x", overwrite=False)
    run.save_config("task: text-generation\n")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, run.path], stdout=subprocess.PIPE, text=True
    )
    who = f" (process {process.pid})" if sys.platform == "linux" else ""
    words = re.escape(f"another run is writing to it{who}. Wait")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        for overwrite, resume in ((True, False), (False, True)):
            with pytest.raises(ConfigError, match=words):
                check_output(run.path, overwrite=overwrite, resume=resume)
        with pytest.raises(ConfigError, match="another run is writing to it"):
            open_run(run.path, "x", overwrite=True)
        assert (run.path / "config.yaml").is_file()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    check_output(run.path, overwrite=False, resume=True)
    assert sorted(path.name for path in run.path.iterdir()) == [
        ".ftlevel.json",
        "checkpoints",
        "config.yaml",
    ]


def test_a_run_that_began_first_keeps_the_directory(tmp_path: Path) -> None:
    check_output(tmp_path / "run", overwrite=False, resume=False)
    open_run(tmp_path / "run", "x", overwrite=False)
    with pytest.raises(
        ConfigError, match=r"another run has started in it\. Choose another directory\."
    ):
        open_run(tmp_path / "run", "x", overwrite=False)


def test_a_directory_that_cannot_be_created_is_named() -> None:
    with pytest.raises(ConfigError, match="--output-dir /proc/run cannot be created"):
        open_run(Path("/proc/run"), "x", overwrite=False)


def test_what_is_held_is_free_again(tmp_path: Path) -> None:
    with lock_dir(tmp_path), pytest.raises(ConfigError):
        check_lock(tmp_path)
    check_lock(tmp_path)


def test_the_processes_of_a_run_may_look_at_once(tmp_path: Path) -> None:
    with lock_dir(tmp_path, shared=True):  # as another of them does
        check_lock(tmp_path)
        with pytest.raises(ConfigError, match="another run is writing"), lock_dir(tmp_path):
            pass
