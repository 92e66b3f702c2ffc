"""Callbacks for checkpoints: manifest, rotation, saving by time, stream state; disk space."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.checkpoints import rotate_best
from ftlevel.artifacts.run_directory import RunDirectory, delete_backup
from ftlevel.config import TrainerConfig
from ftlevel.errors import ConfigError, RunError
from ftlevel.training.processes import Processes

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM}
_STATES = {"ademamix": 3, "adamw": 2, "lion": 1, "rmsprop": 1, "adagrad": 1}
"""States that an optimizer has per parameter; others have none or factored ones."""
_ALMOST_FULL = 1 << 20  # bytes: torch does not report a full disk as such
_WRITER_ERRORS = ("inline_container", "PytorchStreamWriter", "iostream error", "while serializing")


def check_disk_space(run_path: Path | None, train: TrainerConfig, model: Any, steps: int) -> None:
    """Raise ConfigError if the disk cannot hold the run's checkpoints (`save_total_limit` + 1).

    Files already in `run_path` count as free space: they will be replaced, or are checkpoints.
    """
    one, count = checkpoint_bytes(model, train.optim), max_num_checkpoints(train, steps)
    output_dir = run_path or Path("runs")
    mount = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    used = sum(p.stat().st_size for p in output_dir.rglob("*") if p.is_file()) if run_path else 0
    free = shutil.disk_usage(mount).free
    if one * count > free + used:
        raise ConfigError(
            f"--output-dir {output_dir}: its disk has {_format_size(free)} free, and the run "
            f"needs about {_format_size(one * count)} there: {count} x {_format_size(one)} of "
            f"checkpoints (--save-total-limit {train.save_total_limit}, and the one that is being "
            "written). Free space, keep fewer, or choose a directory on another disk."
        )


def check_checkpoint_space(output_dir: RunDirectory, model: Any, optimizer: Any) -> None:
    """Raise RunError if the next checkpoint would fill the disk of `output_dir`."""
    states = getattr(optimizer, "state", {}).values()
    tensors = [part for state in states for part in state.values() if hasattr(part, "nbytes")]
    required = _trained_bytes(model) + sum(part.nbytes for part in tensors)
    free = shutil.disk_usage(output_dir.path).free
    if required > free:
        raise RunError(
            f"{output_dir.path} cannot be written: a checkpoint needs about "
            f"{_format_size(required)}, and its disk has {_format_size(free)} free. "
            f"{_checkpoint_message(output_dir)}"
        )


def _format_size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _trained_bytes(model: Any) -> int:
    return sum(int(p.nbytes) for p in model.parameters() if p.requires_grad)


def checkpoint_bytes(model: Any, optim: str) -> int:
    """Returns the approximate size of a checkpoint: weights and optimizer states."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = next((count for name, count in _STATES.items() if name in optim), 0)
    return _trained_bytes(model) + states * (1 if "8bit" in optim else 4) * trained


def max_num_checkpoints(train: TrainerConfig, steps: int) -> int:
    """Returns the most checkpoints that a run of `steps` steps has at once, one being written."""
    if train.save_strategy == "no":
        return 0
    if train.save_strategy == "epoch":
        num_checkpoints = math.ceil(train.num_train_epochs)
    elif train.save_strategy == "best":
        num_checkpoints = train.save_total_limit + 1
    elif interval := train.save_steps:
        num_checkpoints = int(steps / interval if interval >= 1 else 1 / interval)
    else:
        num_checkpoints = 1
    return max(1, min(num_checkpoints, train.save_total_limit + 1))


@contextlib.contextmanager
def explain_disk_errors(output_dir: RunDirectory) -> Iterator[None]:
    """Convert write errors of torch, safetensors and the OS in the `with` block into RunError."""
    try:
        yield
    except Exception as error:
        message = _disk_error_message(error, output_dir)
        if message is None:
            raise
        run_error = RunError(
            f"{output_dir.path} cannot be written: {message}. {_checkpoint_message(output_dir)}"
        )
        run_error.is_reported = getattr(error, "is_reported", False)
        raise run_error from error


def _disk_error_message(error: Exception, output_dir: RunDirectory) -> str | None:
    number, path = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if isinstance(path, str):
        parents = (*Path(path).absolute().parents, *Path(path).resolve().parents)
        if not {output_dir.path.absolute(), output_dir.path.resolve()}.intersection(parents):
            return None  # a file of something else, such as a callback
    text = str(error)
    is_writer_error = any(word in text for word in _WRITER_ERRORS)
    if number not in _FULL | _REFUSED and not is_writer_error:
        return None
    free = shutil.disk_usage(output_dir.path).free
    if number in _FULL or "os error 28" in text or (is_writer_error and free < _ALMOST_FULL):
        return f"its disk is full ({free / 1e6:,.1f} MB free)"
    return os.strerror(number) if number else text.split("\n")[0]


def _checkpoint_message(output_dir: RunDirectory) -> str:
    # On resume, newer incomplete checkpoints are renamed with a warning.
    checkpoint, _ = checkpoints.get_last_valid_checkpoint(output_dir.checkpoints)
    if checkpoint is None:
        return "There is no valid checkpoint. Fix that, and start again with --overwrite."
    return (
        f"{checkpoint} is complete. Fix that, and resume with: ftlevel train --output-dir "
        f"{quote(str(output_dir.path))} --resume"
    )


class WriteManifest(TrainerCallback):
    """Callback that writes each checkpoint's manifest, then deletes old checkpoints.

    It also deletes a run that this one overwrites.

    Args:
        write_files: adds tokenizer and card to a checkpoint directory.
        run_after_save: calls a function once the checkpoint is written in the background; None if
            checkpoints are written at once.
    """

    def __init__(
        self,
        output_dir: RunDirectory,
        keep: int,
        write_files: Callable[[Path], None],
        processes: Processes,
        run_after_save: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self.checkpoint_dir = output_dir.checkpoints
        self.keep = keep
        self._save_files = write_files
        self._output_dir = output_dir
        self._processes = processes
        self._run_after_save = run_after_save

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the disk has space for the next checkpoint."""
        if control.should_save and self._processes.is_first:
            check_checkpoint_space(self._output_dir, kwargs["model"], kwargs["optimizer"])

    on_epoch_end = on_evaluate = on_step_end

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the manifest once the checkpoint is complete."""
        self._processes.wait()  # every process writes its random state
        if not self._processes.is_first:
            return
        checkpoint = self.checkpoint_dir / f"checkpoint-{state.global_step}"
        self._save_files(checkpoint)
        if self._run_after_save is None:
            self._write_manifest(checkpoint)
        else:
            self._run_after_save(functools.partial(self._write_manifest, checkpoint))

    def _write_manifest(self, checkpoint: Path) -> None:
        checkpoints.certify(checkpoint)
        checkpoints.rotate(self.checkpoint_dir, self.keep)
        rotate_best(self.checkpoint_dir)
        delete_backup(self.checkpoint_dir.parent)


SMALL_CHECKPOINT = 512_000_000
"""Maximal bytes of a checkpoint that is written at the end by default, so that a run can be
extended."""


class SaveByClock(TrainerCallback):
    """Callback that saves a checkpoint `interval` minutes after the previous one.

    The clock of the first process decides for all. The last step is saved if `last` is set, or if
    the time was up before.
    """

    def __init__(self, interval: float, processes: Processes, *, last: bool = False) -> None:
        self._seconds = interval * 60
        self._processes = processes
        self._last_time = 0.0
        self._save_last = last

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock that counts the minutes to the next checkpoint."""
        self._last_time = time.monotonic()

    on_save = on_train_begin

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save if the interval has passed, or at the last step if that must be saved."""
        is_time = self._processes.is_first and time.monotonic() - self._last_time >= self._seconds
        is_time = self._processes.any(is_time)
        self._save_last |= is_time
        is_end = state.global_step >= state.max_steps
        control.should_save |= is_time or (is_end and self._save_last)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save if this evaluation stops training early and the last step must be saved."""
        is_early = control.should_training_stop and state.global_step < state.max_steps
        control.should_save |= is_early and self._save_last
