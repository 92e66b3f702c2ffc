"""One run at a time in a run directory: a lock that ends with the process, however it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ftlevel.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def claimed(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold `directory` for this process inside the block.

    The directory itself is locked (flock), so that no file is left behind; where its file system
    has no locks, nothing is held.

    Args:
        directory: of a run.
        shared: let others hold it so, too.

    Raises:
        ConfigError: another process holds it.
    """
    descriptor = _open(directory)
    try:
        if descriptor is not None and fcntl is not None:
            try:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"--output-dir {directory}: another run is writing into it"
                    f"{_holder(descriptor)}. Wait for its end, or name another directory."
                ) from None
            except OSError:  # no locks on this file system
                pass
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def check_unclaimed(directory: Path) -> None:
    """Refuse a directory that another run writes into; the processes of one run may look at once.

    Raises:
        ConfigError: it does.
    """
    with claimed(directory, shared=True):
        pass


def _holder(descriptor: int) -> str:
    """Name the process that holds what `descriptor` is of, where Linux knows it."""
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5] == f"{device}:{status.st_ino}":
                return f" (process {words[4]})"
    return ""


def _open(directory: Path) -> int | None:
    try:
        return os.open(directory, os.O_RDONLY)
    except OSError:
        return None
