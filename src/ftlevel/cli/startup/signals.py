"""How a command ends that is told to: as by Ctrl-C, with the exit code of the signal."""

from __future__ import annotations

import signal
from types import FrameType

_NAMES = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_last = signal.SIGINT


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, which says what was kept.

    SIGUSR1, which is for a run that is trained, ends nothing.
    """
    for name in _NAMES:
        if (number := getattr(signal, name, None)) is not None and (
            signal.getsignal(number) is not signal.SIG_IGN  # of nohup
        ):
            signal.signal(number, _end)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, _ignore)


def exit_code() -> int:
    """Return the exit code of a command that was interrupted: 130, or 143 by SIGTERM."""
    return 128 + _last


def _ignore(_: int, __: FrameType | None) -> None:
    """Do nothing; an ignored signal could not be told from one that the caller wants ignored."""


def _end(number: int, _: FrameType | None) -> None:
    global _last
    _last = signal.Signals(number)
    raise KeyboardInterrupt
