"""Temporary directories that are deleted with their process, or later if it was killed."""

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
except ImportError:  # Windows: no locks, no sweep
    fcntl = None  # type: ignore[assignment]

_PREFIX = "ftlevel-"
_MARKER = ".ftlevel-workspace"
"""Subdirectory locked with flock while the process lives; a directory without it is not ours."""

_MAX_AGE = 24 * 3600
"""Seconds without a change after which an unlocked directory counts as abandoned."""


class Workspace:
    """Temporary directory at `name`, deleted at the end of the block or with this object.

    Creating one also deletes directories of processes that were killed.
    """

    def __init__(self, name: str) -> None:
        self._outer = tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{name}-")
        outer = Path(self._outer.name)
        (outer / _MARKER).mkdir()
        descriptor = _lock(outer)
        self._unlock = (
            weakref.finalize(self, os.close, descriptor) if descriptor is not None else None
        )
        self.name = str(outer / name)
        Path(self.name).mkdir()
        sweep(outer.parent)

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Delete the directory."""
        self._outer.cleanup()
        if self._unlock is not None:
            self._unlock()


def sweep(parent: Path) -> None:
    """Delete this user's old, unlocked workspaces in `parent`."""
    if fcntl is None:
        return
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            marker = (folder / _MARKER).lstat()
            is_old = time.time() - marker.st_mtime > _MAX_AGE
            if not is_old or marker.st_uid != os.getuid() or folder.is_symlink():
                continue
            descriptor = _lock(folder)
            if descriptor is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Lock `folder` and return the file descriptor, or None if it cannot be locked."""
    if fcntl is None:
        return None
    descriptor = os.open(folder / _MARKER, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked by another process, or locks unsupported
        os.close(descriptor)
        return None
    return descriptor
