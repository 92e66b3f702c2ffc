"""A temporary folder goes with its process, or with a later one where it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ftlevel.artifacts.files import Workspace, sweep

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is locked there")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def make_old(workspace: Path) -> None:
    then = time.time() - 48 * 3600
    os.utime(workspace.parent / ".ftlevel-workspace", (then, then))


def test_what_a_killed_process_left_goes_with_the_next(folder: Path) -> None:
    script = (
        "import os, tempfile, time\nfrom ftlevel.artifacts.files import Workspace\n"
        f"tempfile.tempdir = {str(folder)!r}\nkept = Workspace('rows')\n"
        "open(kept.name + '/x', 'w').close()\nprint(kept.name, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        left = Path(one.stdout.readline().strip())
        make_old(left)
        with Workspace("rows"):
            assert (left / "x").exists(), "its process lives"
        one.send_signal(signal.SIGKILL)
    assert left.exists()
    with Workspace("merge"):
        assert not left.exists()
    assert list(folder.iterdir()) == []


def test_what_is_new_or_of_others_stays(folder: Path) -> None:
    new, users, link = (folder / f"ftlevel-rows-{name}" for name in ("new", "users", "link"))
    for path in (new / "rows", users):
        path.mkdir(parents=True)
    (new / ".ftlevel-workspace").mkdir()
    old = time.time() - 1e6
    os.utime(users, (old, old))
    link.symlink_to(users)
    sweep(folder)
    assert {new, users, link} == set(folder.iterdir())


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_one_that_is_dropped_holds_nothing(folder: Path) -> None:
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else None
    for _ in range(5):
        Workspace("rows").cleanup()
        kept = Workspace("rows")
        del kept
    assert list(folder.iterdir()) == []
    assert before is None or len(list(descriptors.iterdir())) == before
