"""Python files of reward functions, which recipes, runs and adapters of strangers may name.

A file is run if the user named it on the command line, in this command or in an earlier run on this
machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from ftlevel.safe_io import open_existing


class Spec(Protocol):
    """Interface of a reward's specification, `config.RewardSpec`."""

    @property
    def text(self) -> str:
        """Value of `--reward`."""

    @property
    def kind(self) -> str:
        """builtin, function or model."""

    @property
    def name(self) -> str:
        """Python file of a function."""


def check_reward_files(rewards: Iterable[Spec], location: str) -> Iterator[str]:
    """Yields a message for each Python file in `rewards`, named by `location`, that is not allowed.

    Allowed are files that `allow_reward_files` has recorded and that have not changed since.
    """
    specs = list(rewards)
    problems = [spec for spec in specs if spec.kind == "function" and not _is_allowed(spec.name)]
    flags = " ".join(f"--reward {shlex.quote(spec.text)}" for spec in specs)
    for spec in problems:
        yield (
            f"{location}: the reward {spec.text} runs the Python file {spec.name}, which you have "
            f"not run before, or which has changed. If you trust the file, name the rewards on the "
            f"command line: {flags}"
        )


def allow_reward_files(rewards: Iterable[Spec]) -> None:
    """Record the Python files of `rewards` by path and SHA-256, so that later commands run them."""
    lines = [
        line
        for spec in rewards
        if spec.kind == "function" and (line := _record(spec.name)) and not _is_allowed(spec.name)
    ]
    if lines:
        with contextlib.suppress(OSError):  # later commands then need --reward
            _records().parent.mkdir(parents=True, exist_ok=True)
            with open_existing(_records()) as file:
                file.write("".join(f"{line}\n" for line in lines))


def _is_allowed(path: str) -> bool:
    record = _record(path)
    with contextlib.suppress(OSError, ValueError):
        return record is None or record in _records().read_text(encoding="utf-8").split("\n")
    return False


def _record(path: str) -> str | None:
    """Returns the line for a Python file; None if it is none, and so cannot be run."""
    try:
        file = Path(path).expanduser().resolve()
        if not file.is_file():  # a pipe, on which reading blocks
            return None
        return f"{hashlib.sha256(file.read_bytes()).hexdigest()} {str(file)!r}"
    except (OSError, ValueError):
        return None


def _records() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ftlevel" / "reward-files.txt"
