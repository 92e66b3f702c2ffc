"""The best models of a run, beside its checkpoints: best-N directories with the weights of a step.

They are certified like checkpoints. A run that goes on from a checkpoint needs the one that was
best when that was written, so each checkpoint has one, and the newest of all stays.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ftlevel.artifacts.checkpoints import MANIFEST, certify, numbered, step_of

_NAME = re.compile(r"best-(\d+)")


def best_of(directory: Path, step: int) -> Path:
    """Return where the best model of `step` lies, in the directory of the checkpoints."""
    return directory / f"best-{step}"


def write_best(directory: Path, step: int, write: Callable[[Path], None]) -> None:
    """Let `write` fill the best model of `step`; absent or whole, and older ones go after it."""
    partial, whole = directory / ".best.partial", best_of(directory, step)
    if whole.exists() and not (whole / MANIFEST).is_file():  # of somebody else
        whole.rename(whole.with_name(f"{whole.name}-kept"))
    for left in (partial, whole):
        if left.exists():
            shutil.rmtree(left)
    partial.mkdir()
    write(partial)
    certify(partial)
    partial.rename(whole)
    rotate_best(directory)


def rotate_best(directory: Path) -> None:
    """Delete the best models that are neither the newest nor the best of a checkpoint's time."""
    found = _numbered_best(directory)
    steps = [step_of(checkpoint) for checkpoint in numbered(directory)]
    needed = {_newest(found, step) for step in steps} | set(found[-1:])
    for path in found:
        if path not in needed:
            shutil.rmtree(path)


def forget_later(directory: Path, step: int) -> None:
    """Delete the best models after `step`: the run goes on from there."""
    for path in _numbered_best(directory):
        if step_of(path) > step:
            shutil.rmtree(path)


def forget_unreachable(directory: Path) -> None:
    """Delete all best models of a run that ended, where no checkpoint is left to go on from."""
    if not numbered(directory):
        forget_later(directory, 0)


def _newest(found: list[Path], step: int) -> Path | None:
    return next((path for path in reversed(found) if step_of(path) <= step), None)


def _numbered_best(directory: Path) -> list[Path]:
    """Return the best-N directories of `directory` that a run has certified, by their step."""
    named = [p for p in directory.glob("best-*") if _NAME.fullmatch(p.name)]
    found = [p for p in named if (p / MANIFEST).is_file()]
    return sorted(found, key=step_of)
