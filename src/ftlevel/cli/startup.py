"""How a command ends that is told to: in a line, with the exit code of the signal.

Set up the process of a command before torch is imported, and import it in peace.

torch, transformers and PEFT make half a million objects while they are imported, and nearly all of
them stay to the end of the process. Python's cycle collector goes through all of them again
whenever their number has grown by a quarter: a fifth of the time to the first training step.

On a CPU, oneDNN keeps the code that it has made for each shape of a product, 1,024 of them. Rows of
text have other lengths in every step, so what it keeps is of no use later: 0.4 MB a shape.

Have the threads of a training process share two heaps.

glibc gives every thread a heap of its own, and what was freed in one serves no other.
Parallel workers (`fast.parallel_workers`) ask for the same tensors over and over, each in threads
of its own. With few heaps, SmolLM2's steps need a sixth less memory, and what is free stays in the
process up to `KEPT_FREE`, so that the kernel does not clear the same pages in every step. With only
one, threads would wait for its lock (docs/performance.md).

What a process of `compare` does first, as `main` does for a command of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_SOON = 0.05  # seconds, in which the block is left
_received: int | None = None
_ends_at_once = False
_last_words: Callable[[], int] | None = None


def end_on_signals(last_words: Callable[[], int]) -> None:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, which says what was kept.

    SIGUSR1, which is for a run that is trained, ends nothing.

    Args:
        last_words: says that the command has kept nothing and returns its exit code.
    """
    global _last_words
    _last_words = last_words
    sys.unraisablehook = _not_lost
    for name in _NAMES:
        if (number := getattr(signal, name, None)) is not None and (
            signal.getsignal(number) is not signal.SIG_IGN  # of nohup
        ):
            signal.signal(number, _end)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, _ignore)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a signal end the process of a command inside the block, where nothing is written yet.

    Libraries lose a KeyboardInterrupt in their imports: some swallow it, and the command runs on;
    transformers makes a ModuleNotFoundError of it.
    """
    global _ends_at_once
    before, _ends_at_once = _ends_at_once, True
    try:
        yield
    finally:
        _ends_at_once = before


def was_told_to_end() -> bool:
    """Whether a signal has come that ends a command, whatever a library has made of it."""
    return _received is not None


def exit_code() -> int:
    """Return the exit code of a command that was interrupted: 130, or 143 by SIGTERM."""
    return 128 + (_received or signal.SIGINT)


def end_as_it_is(code: int) -> None:
    """Let no signal break off the end of a process that has done and said all that it was to.

    Python deletes temporary folders then, and would print an interrupt that it ignores. A second
    signal ends it at once.

    Args:
        code: what it exits with.
    """
    seen: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            os._exit(code)

    for name in _NAMES:
        if (known := getattr(signal, name, None)) is not None and (signal.getsignal(known) is _end):
            signal.signal(known, end)


def _not_lost(unraisable: Any) -> None:
    """Send the signal again whose interrupt came where Python cannot pass it on, as in `__del__`.

    Args:
        unraisable: as `sys.unraisablehook` gets it; what is none is shown as Python shows it.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt) and _received is not None:
        import threading  # 3 ms, which no command pays that is not interrupted

        again = threading.Timer(_SOON, os.kill, (os.getpid(), _received))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def _ignore(_: int, __: FrameType | None) -> None:
    """Do nothing; an ignored signal could not be told from one that the caller wants ignored."""


def _end(number: int, _: FrameType | None) -> None:
    global _received
    _received = number
    if _ends_at_once and _last_words is not None:
        os._exit(_last_words())
    raise KeyboardInterrupt


KEPT_SHAPES = 128
"""Shapes whose code is kept: those of a step. With 1,024 of them 12 steps of SmolLM2 hold 350 MB
more, in no less time (docs/performance.md)."""


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Keep the cycle collector from running in the block, and from what was made by its end.

    A signal ends a command at once in it.

    Where torch is imported already nothing is changed: in a program that uses ftlevel, or in a
    test, what lives may be anybody's, and garbage among it could never be freed.
    """
    if "torch" not in sys.modules:  # they are read once
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(name, str(KEPT_SHAPES))
    with ending_at_once():
        if "torch" in sys.modules or not gc.isenabled():
            yield
            return
        gc.disable()
        try:
            yield
            gc.freeze()
            atexit.register(_thaw)
        finally:
            gc.enable()


def _thaw() -> None:
    """Give the collector back what it was kept from, where the end of the process asks for it.

    Triton's binding (nanobind) prints thousands of its functions as leaked if they outlive their
    module; torch for CUDA brings Triton, and bitsandbytes imports it on a CPU, too.
    """
    if "triton" in sys.modules:
        gc.unfreeze()


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


NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that tell at import which GPU kernels this machine lacks, and what torch deprecates."""


def hush() -> None:
    """Keep libraries from telling at their import what nobody asked for."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def prepare() -> None:
    """Set up a process in which a run is trained."""
    hush()
    share_heaps()


hush()  # a server of processes imports this before the libraries
