"""A temporary directory is deleted with its process, or by a later one if that was killed."""

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


def set_old_mtime(workspace: Path) -> None:
    timestamp = time.time() - 48 * 3600
    os.utime(workspace.parent / ".ftlevel-workspace", (timestamp, timestamp))


def test_workspace_of_killed_process_is_deleted_later(folder):
    script = (
        "import os, tempfile, time\nfrom ftlevel.artifacts.files import Workspace\n"
        f"tempfile.tempdir = {str(folder)!r}\nkept = Workspace('rows')\n"
        "open(kept.name + '/x', 'w').close()\nprint(kept.name, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        workspace = Path(process.stdout.readline().strip())
        set_old_mtime(workspace)
        with Workspace("rows"):
            assert (workspace / "x").exists(), "its process lives"
        process.send_signal(signal.SIGKILL)
    assert workspace.exists()
    with Workspace("merge"):
        assert not workspace.exists()
    assert list(folder.iterdir()) == []


def test_new_and_foreign_directories_are_kept(folder):
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
def test_deleted_workspace_frees_files_and_descriptors(folder):
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else None
    for _ in range(5):
        Workspace("rows").cleanup()
        workspace = Workspace("rows")
        del workspace
    assert list(folder.iterdir()) == []
    assert before is None or len(list(descriptors.iterdir())) == before
