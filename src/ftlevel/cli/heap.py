"""Have the threads of a training process share two heaps.

glibc gives every thread a heap of its own, and what was freed in one serves no other.
Parallel workers (`fast.parallel_workers`) ask for the same tensors over and over, each in threads
of its own. With few heaps, SmolLM2's steps need a sixth less memory, and what is free stays in the
process up to `KEPT_FREE`, so that the kernel does not clear the same pages in every step. With only
one, threads would wait for its lock (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

HEAPS = 2
"""How many there are."""

KEPT_FREE = 128 << 20
"""Bytes at the end of the heap that are kept when they are free."""

LARGEST_IN_HEAP = 32 << 20
"""Bytes from which on a tensor has pages of its own, which it gives back; glibc's own maximum."""

# mallopt(3), whose parameters malloc.h numbers.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8

_SAID_BY_USERS = ("MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def share_heaps() -> bool:
    """Have threads that are started from now on take memory from `HEAPS` heaps.

    Nothing is done where somebody has set malloc's own variables or GLIBC_TUNABLES, where another
    allocator is preloaded, and where the C library is not glibc.

    Returns:
        Whether it was done.
    """
    told = any(os.environ.get(name) for name in (*_SAID_BY_USERS, "GLIBC_TUNABLES", "LD_PRELOAD"))
    if told or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = (
        (_ARENA_MAX, HEAPS), (_TRIM_THRESHOLD, KEPT_FREE), (_MMAP_THRESHOLD, LARGEST_IN_HEAP),
    )  # fmt: skip
    results = [library.mallopt(name, value) for name, value in settings]
    return results == [1] * len(settings)
