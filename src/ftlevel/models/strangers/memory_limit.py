"""An end to the memory that what others wrote and we run can ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import resource
except ImportError:  # Windows, where nothing is limited
    resource = None  # type: ignore[assignment]

_SIZES = Path("/proc/self/statm")  # in pages; the sixth is data and stack


@contextmanager
def taking_at_most(size: int) -> Iterator[None]:
    """Let the process take at most `size` more bytes inside the block; on Linux alone.

    Raises:
        MemoryError: in the block, where it asks for more.
    """
    if resource is None or not _SIZES.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    now = int(_SIZES.read_text().split()[5]) * resource.getpagesize()
    wish = now + size
    if before[0] != resource.RLIM_INFINITY:
        wish = min(wish, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (wish, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
