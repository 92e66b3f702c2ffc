"""An end to the memory that what others wrote and we run can ask for."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import resource
except ImportError:  # Windows, where nothing is limited
    resource = None  # type: ignore[assignment]

_SIZES = Path("/proc/self/statm")  # in pages; the sixth is data and stack


@functools.lru_cache(maxsize=1)
def _sizes_of(_process: int) -> io.FileIO | None:
    """Return the file of this process's sizes, which stays open: it is read once for each row."""
    return io.FileIO(_SIZES) if _SIZES.exists() else None


@contextmanager
def taking_at_most(size: int) -> Iterator[None]:
    """Let the process take at most `size` more bytes inside the block; on Linux alone.

    Raises:
        MemoryError: in the block, where it asks for more.
    """
    sizes = _sizes_of(os.getpid())
    if resource is None or sizes is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    pages = os.pread(sizes.fileno(), 256, 0).split()[5]
    wish = int(pages) * resource.getpagesize() + size
    if before[0] != resource.RLIM_INFINITY:
        wish = min(wish, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (wish, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
