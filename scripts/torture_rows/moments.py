"""Moments of a run, counted by file operations, so that a seed selects the same one."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Course:
    """How many file events a run has made when each of its checkpoints was certified.

    Attributes:
        certified: the events until then, a number a checkpoint.
        total: all of them.
    """

    certified: list[int]
    total: int


def _is_event(name: str) -> bool:
    return name == "open" or name.startswith(("os.", "shutil."))


def counting(into: Path) -> Callable[[], None]:
    """Return what makes a process write its course into a file, for `read_course`."""

    def begin() -> None:
        file = os.open(into, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        course: dict[str, Any] = {"certified": [], "total": 0}

        def watch(name: str, arguments: tuple[Any, ...]) -> None:
            if not _is_event(name):
                return
            course["total"] += 1
            if name == "os.rename" and str(arguments[1]).endswith("/manifest.json"):
                course["certified"].append(course["total"])
            text = json.dumps(course).encode()
            os.pwrite(file, text, 0)

        sys.addaudithook(watch)

    return begin


def read_course(path: Path) -> Course:
    """Return what `counting` has written."""
    return Course(**json.loads(path.read_text()))


def at_event(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Return what makes a process do `act` just before its file event of that number."""

    def begin() -> None:
        seen = [0]

        def watch(name: str, _: tuple[Any, ...]) -> None:
            if _is_event(name):
                seen[0] += 1
                if seen[0] == number:
                    act()

        sys.addaudithook(watch)

    return begin


def killing(number: int) -> Callable[[], None]:
    """Return what makes a process kill itself at its file event of that number."""
    return at_event(number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def signalling(number: int, *which: int) -> Callable[[], None]:
    """Return what makes a process send itself signals at its file event of that number."""

    def act() -> None:
        for one in which:
            # A handler may raise here; what is hooked must not lose it.
            os.kill(os.getpid(), one)

    return at_event(number, act)
