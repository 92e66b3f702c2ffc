"""Moments of a run, counted in file operations, so that a seed selects the same one."""

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
    """File events until each checkpoint was complete, and their total."""

    certified: list[int]
    total: int


def _is_event(name: str) -> bool:
    return name == "open" or name.startswith(("os.", "shutil."))


def counting(path: Path) -> Callable[[], None]:
    """Return a function that makes a process write its course to a file, for `read_course`."""

    def install() -> None:
        file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
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

    return install


def read_course(path: Path) -> Course:
    """Return the course that `counting` has written."""
    return Course(**json.loads(path.read_text()))


def at_event(number: int, action: Callable[[], None]) -> Callable[[], None]:
    """Return a function that makes a process call `action` just before a file event."""

    def install() -> None:
        count = [0]

        def watch(name: str, _: tuple[Any, ...]) -> None:
            if _is_event(name):
                count[0] += 1
                if count[0] == number:
                    action()

        sys.addaudithook(watch)

    return install


def killing(number: int) -> Callable[[], None]:
    """Return a function that makes a process kill itself at a file event."""
    return at_event(number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def signalling(number: int, *signals: int) -> Callable[[], None]:
    """Return a function that makes a process send itself signals at a file event."""

    def send() -> None:
        for signal_number in signals:
            # A signal handler may raise here; the audit hook must not lose the exception.
            os.kill(os.getpid(), signal_number)

    return at_event(number, send)
