"""How a command ends that is told to: in a line, with the exit code of the signal."""

from __future__ import annotations

import contextlib
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
