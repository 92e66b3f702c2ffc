"""Check disk space for checkpoints, and convert write errors into a RunError."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import TrainerConfig
from ftlevel.errors import ConfigError, RunError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM}
_STATES = {"ademamix": 3, "adamw": 2, "lion": 1, "rmsprop": 1, "adagrad": 1}
"""States that an optimizer has per parameter; others have none or factored ones."""
_NEXT_TO_NOTHING = 1 << 20  # bytes: torch does not report a full disk as such
_WRITERS = ("inline_container", "PytorchStreamWriter", "iostream error", "while serializing")


def check_disk_space(directory: Path | None, train: TrainerConfig, model: Any, steps: int) -> None:
    """Raise ConfigError if the disk lacks space for the checkpoints of a run.

    Counts `save_total_limit` checkpoints plus the one being written. Files already in `directory`
    count as free space, because they are replaced or are among these checkpoints.
    """
    one, count = checkpoint_bytes(model, train.optim), _planned_checkpoints(train, steps)
    where = directory or Path("runs")
    place = next(path for path in (where, *where.absolute().parents) if path.exists())
    held = sum(p.stat().st_size for p in where.rglob("*") if p.is_file()) if directory else 0
    free = shutil.disk_usage(place).free
    if one * count > free + held:
        raise ConfigError(
            f"--output-dir {where}: its disk has {free / 1e9:,.2f} GB free, and the run needs "
            f"about {one * count / 1e9:,.2f} GB there: {count} x {one / 1e9:,.2f} GB of "
            f"checkpoints (--save-total-limit {train.save_total_limit}, and the one that is being "
            "written). Free some, keep fewer, or name a directory on another disk."
        )


def check_room_to_save(directory: RunDirectory, model: Any, optimizer: Any) -> None:
    """Raise RunError if the next checkpoint would fill the disk of `run`."""
    states = getattr(optimizer, "state", {}).values()
    held = [part for state in states for part in state.values() if hasattr(part, "nbytes")]
    needed = _trained_bytes(model) + sum(part.nbytes for part in held)
    free = shutil.disk_usage(directory.path).free
    if needed > free:
        raise RunError(
            f"{directory.path} cannot be written: a checkpoint needs about {needed / 1e6:,.1f} MB, "
            f"and its disk has {free / 1e6:,.1f} MB free. {_what_is_kept(directory)}"
        )


def _trained_bytes(model: Any) -> int:
    return sum(int(p.nbytes) for p in model.parameters() if p.requires_grad)


def checkpoint_bytes(model: Any, optim: str) -> int:
    """Return the approximate size of a checkpoint: weights and optimizer states."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = next((count for name, count in _STATES.items() if name in optim), 0)
    return _trained_bytes(model) + states * (1 if "8bit" in optim else 4) * trained


def _planned_checkpoints(train: TrainerConfig, steps: int) -> int:
    if train.save_strategy == "no":
        return 0
    if train.save_strategy == "epoch":
        planned = math.ceil(train.num_train_epochs)
    elif train.save_strategy == "best":
        planned = train.save_total_limit + 1
    elif every := train.save_steps:
        planned = int(steps / every if every >= 1 else 1 / every)
    else:
        planned = 1
    return max(1, min(planned, train.save_total_limit + 1))


@contextlib.contextmanager
def explain_disk_errors(directory: RunDirectory) -> Iterator[None]:
    """Convert write errors of torch, safetensors and the OS for files of `run` into RunError."""
    try:
        yield
    except Exception as error:
        reason = _reason(error, directory)
        if reason is None:
            raise
        told = RunError(f"{directory.path} cannot be written: {reason}. {_what_is_kept(directory)}")
        told.is_reported = getattr(error, "is_reported", False)
        raise told from error


def _reason(error: Exception, directory: RunDirectory) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    of_writer = any(word in text for word in _WRITERS)
    if number not in _FULL | _REFUSED and not of_writer:
        return None
    free = shutil.disk_usage(directory.path).free
    if number in _FULL or "os error 28" in text or (of_writer and free < _NEXT_TO_NOTHING):
        return f"its disk is full ({free / 1e6:,.1f} MB free)"
    return os.strerror(number) if number else text.split("\n")[0]


def _what_is_kept(directory: RunDirectory) -> str:
    # On resume, newer incomplete checkpoints are renamed with a warning.
    whole, _ = checkpoints.find_newest_intact(directory.checkpoints)
    if whole is None:
        return "There is no valid checkpoint: fix that, and start again with --overwrite."
    return (
        f"{whole} is whole. Fix that, and go on with: ftlevel train --output-dir "
        f"{quote(str(directory.path))} --resume"
    )
