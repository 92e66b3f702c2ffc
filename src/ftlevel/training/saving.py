"""Callbacks for checkpoints: manifest, rotation, saving by time, stream state; disk space."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.checkpoints import rotate_best
from ftlevel.artifacts.run_directory import RunDirectory, delete_backup
from ftlevel.config import TrainerConfig
from ftlevel.data.prepare.streaming import StreamedRows
from ftlevel.errors import ConfigError, RunError
from ftlevel.training.processes import Processes

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM}
_STATES = {"ademamix": 3, "adamw": 2, "lion": 1, "rmsprop": 1, "adagrad": 1}
"""States that an optimizer has per parameter; others have none or factored ones."""
_ALMOST_FULL = 1 << 20  # bytes: torch does not report a full disk as such
_WRITERS = ("inline_container", "PytorchStreamWriter", "iostream error", "while serializing")


def check_disk_space(directory: Path | None, train: TrainerConfig, model: Any, steps: int) -> None:
    """Raise ConfigError if the disk has no space for the checkpoints of a run.

    Counts `save_total_limit` checkpoints plus the one being written. Files already in `directory`
    count as free space, because they are replaced or are among these checkpoints.
    """
    one, count = checkpoint_bytes(model, train.optim), _planned_checkpoints(train, steps)
    output_dir = directory or Path("runs")
    mount = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    used = sum(p.stat().st_size for p in output_dir.rglob("*") if p.is_file()) if directory else 0
    free = shutil.disk_usage(mount).free
    if one * count > free + used:
        raise ConfigError(
            f"--output-dir {output_dir}: its disk has {free / 1e9:,.2f} GB free, and the run needs "
            f"about {one * count / 1e9:,.2f} GB there: {count} x {one / 1e9:,.2f} GB of "
            f"checkpoints (--save-total-limit {train.save_total_limit}, and the one that is being "
            "written). Free space, keep fewer, or choose a directory on another disk."
        )


def check_room_to_save(directory: RunDirectory, model: Any, optimizer: Any) -> None:
    """Raise RunError if the next checkpoint would fill the disk of `directory`."""
    states = getattr(optimizer, "state", {}).values()
    tensors = [part for state in states for part in state.values() if hasattr(part, "nbytes")]
    needed = _trained_bytes(model) + sum(part.nbytes for part in tensors)
    free = shutil.disk_usage(directory.path).free
    if needed > free:
        raise RunError(
            f"{directory.path} cannot be written: a checkpoint needs about {needed / 1e6:,.1f} MB, "
            f"and its disk has {free / 1e6:,.1f} MB free. {_describe_checkpoint(directory)}"
        )


def _trained_bytes(model: Any) -> int:
    return sum(int(p.nbytes) for p in model.parameters() if p.requires_grad)


def checkpoint_bytes(model: Any, optim: str) -> int:
    """Returns the approximate size of a checkpoint: weights and optimizer states."""
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
    elif interval := train.save_steps:
        planned = int(steps / interval if interval >= 1 else 1 / interval)
    else:
        planned = 1
    return max(1, min(planned, train.save_total_limit + 1))


@contextlib.contextmanager
def explain_disk_errors(directory: RunDirectory) -> Iterator[None]:
    """Convert write errors of torch, safetensors and the OS in the `with` block into RunError."""
    try:
        yield
    except Exception as error:
        reason = _reason(error, directory)
        if reason is None:
            raise
        run_error = RunError(
            f"{directory.path} cannot be written: {reason}. {_describe_checkpoint(directory)}"
        )
        run_error.is_reported = getattr(error, "is_reported", False)
        raise run_error from error


def _reason(error: Exception, directory: RunDirectory) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    is_writer_error = any(word in text for word in _WRITERS)
    if number not in _FULL | _REFUSED and not is_writer_error:
        return None
    free = shutil.disk_usage(directory.path).free
    if number in _FULL or "os error 28" in text or (is_writer_error and free < _ALMOST_FULL):
        return f"its disk is full ({free / 1e6:,.1f} MB free)"
    return os.strerror(number) if number else text.split("\n")[0]


def _describe_checkpoint(directory: RunDirectory) -> str:
    # On resume, newer incomplete checkpoints are renamed with a warning.
    checkpoint, _ = checkpoints.get_last_valid_checkpoint(directory.checkpoints)
    if checkpoint is None:
        return "There is no valid checkpoint. Fix that, and start again with --overwrite."
    return (
        f"{checkpoint} is complete. Fix that, and resume with: ftlevel train --output-dir "
        f"{quote(str(directory.path))} --resume"
    )


class WriteManifest(TrainerCallback):
    """Write a manifest for each checkpoint, then delete old checkpoints and an overwritten run.

    `keep` is the number of checkpoints to keep. `write_files` adds the files with which a
    checkpoint can be used like a run; None if unsupported. `when_written` calls a function once the
    checkpoint is fully written; None: it is written at once.
    """

    def __init__(
        self,
        directory: RunDirectory,
        keep: int,
        write_files: Callable[[Path], None] | None,
        processes: Processes,
        when_written: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self.directory = directory.checkpoints
        self.keep = keep
        self._write_beside = write_files
        self._directory = directory
        self._processes = processes
        self._when_written = when_written

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any
    ) -> None:
        """Check that the disk has space for the next checkpoint."""
        if control.should_save and self._processes.is_first:
            check_room_to_save(self._directory, told["model"], told["optimizer"])

    on_epoch_end = on_evaluate = on_step_end

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the manifest once the checkpoint is complete."""
        self._processes.wait()  # every process writes its random state
        if not self._processes.is_first:
            return
        checkpoint = self.directory / f"checkpoint-{state.global_step}"
        if self._write_beside is not None:
            self._write_beside(checkpoint)
        if self._when_written is None:
            self._certify(checkpoint)
        else:
            self._when_written(functools.partial(self._certify, checkpoint))

    def _certify(self, checkpoint: Path) -> None:
        checkpoints.certify(checkpoint)
        checkpoints.rotate(self.directory, self.keep)
        rotate_best(self.directory)
        delete_backup(self.directory.parent)


SMALL_CHECKPOINT = 512_000_000
"""Maximal bytes of a checkpoint that is written at the end by default, so that a run can be
extended."""


class SaveByClock(TrainerCallback):
    """Save a checkpoint `minutes` after the last one; if that happens, also save the last step.

    The first process's clock decides for all. With `last`, the last step is saved in any case.
    """

    def __init__(self, minutes: float, processes: Processes, *, last: bool = False) -> None:
        self._seconds = minutes * 60
        self._processes = processes
        self._since = 0.0
        self._saves_end = last

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save if the time is up, or if this is the last step and must be saved."""
        is_time = self._processes.is_first and time.monotonic() - self._since >= self._seconds
        is_time = self._processes.any(is_time)
        self._saves_end |= is_time
        is_end = state.global_step >= state.max_steps
        control.should_save |= is_time or (is_end and self._saves_end)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save if training stops early and its last step must be saved."""
        is_early = control.should_training_stop and state.global_step < state.max_steps
        control.should_save |= is_early and self._saves_end

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Restart the clock."""
        self._since = time.monotonic()


class SaveStreamState(TrainerCallback):
    """Write the position in the streamed dataset into each checkpoint, before its manifest."""

    def __init__(self, rows: StreamedRows, directory: Path) -> None:
        self.rows = rows
        self.directory = directory

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the position in the first process; it is the same in all."""
        if not state.is_world_process_zero:  # it is the same in each
            return
        self.rows.save(self.directory / f"checkpoint-{state.global_step}", state.global_step)


class SaveRollout(TrainerCallback):
    """Call `save` with each checkpoint, before its manifest, to write a rollout still in use."""

    def __init__(self, save: Callable[[Path], None], directory: Path) -> None:
        self._save = save
        self._directory = directory

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the rollout of this process."""
        self._save(self._directory / f"checkpoint-{state.global_step}")


class WaitForBytes(TrainerCallback):
    """Before a checkpoint is saved, wait until the digests of the run's input files are written."""

    def __init__(self, waits: Iterable[Callable[[], None]]) -> None:
        self._waits = list(waits)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Wait if a checkpoint is about to be saved."""
        if control.should_save:
            for wait in self._waits:
                wait()

    on_epoch_end = on_evaluate = on_step_end
