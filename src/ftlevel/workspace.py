"""Temporary folders that go with their process, or with a later one where it was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked and nothing swept
    fcntl = None  # type: ignore[assignment]

_PREFIX = "ftlevel-"
_MARKER = ".ftlevel-workspace"
"""A folder in it, locked (flock) for as long as the process lives; what has none is not ours."""

_OLD = 24 * 3600
"""Seconds without a change after which a folder that nobody holds is of a process that is gone."""


class Workspace:
    """A temporary folder, deleted at the end of the block, or with this object.

    Making one deletes those that processes left which were killed.

    Args:
        name: what is in it; a part of the folder's name.

    Attributes:
        name: its path.
    """

    def __init__(self, name: str) -> None:
        self._outer = tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{name}-")
        outer = Path(self._outer.name)
        (outer / _MARKER).mkdir()
        held = _hold(outer)
        self._let_go = weakref.finalize(self, os.close, held) if held is not None else None
        self.name = str(outer / name)
        Path(self.name).mkdir()
        sweep(outer.parent)

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Delete it."""
        self._outer.cleanup()
        if self._let_go is not None:
            self._let_go()


def sweep(parent: Path) -> None:
    """Delete the old workspaces of this user in `parent` that no process holds."""
    if fcntl is None:
        return
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            marker = (folder / _MARKER).lstat()
            is_old = time.time() - marker.st_mtime > _OLD
            if not is_old or marker.st_uid != os.getuid() or folder.is_symlink():
                continue
            held = _hold(folder)
            if held is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)


def _hold(folder: Path) -> int | None:
    """Return the descriptor that holds `folder`; None where it cannot be held."""
    if fcntl is None:
        return None
    descriptor = os.open(folder / _MARKER, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another holds it, or the file system has no locks
        os.close(descriptor)
        return None
    return descriptor
