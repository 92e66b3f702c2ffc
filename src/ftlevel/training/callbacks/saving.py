"""Callbacks for checkpoints: manifest, rotation, saving by time, stream state, file digests."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.checkpoints import rotate_best
from ftlevel.artifacts.ownership import delete_replaced
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.data.prepare.streaming import StreamedRows
from ftlevel.training.disk import check_room_to_save
from ftlevel.training.processes import Processes


class WriteManifest(TrainerCallback):
    """Write a manifest for each checkpoint, then delete old checkpoints and a replaced run.

    `keep` is the number of checkpoints. `write_tokenizer_and_card` adds the files needed to use a
    checkpoint; None if unsupported. `when_written` calls its argument once all of a checkpoint is
    written; None means at once.
    """

    def __init__(
        self,
        directory: RunDirectory,
        keep: int,
        write_beside: Callable[[Path], None] | None,
        processes: Processes,
        when_written: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self.directory = directory.checkpoints
        self.keep = keep
        self._write_beside = write_beside
        self._directory = directory
        self._processes = processes
        self._when_written = when_written

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **told: Any,
    ) -> None:
        """Check that the disk has space for the next checkpoint."""
        if control.should_save and self._processes.is_first:
            check_room_to_save(self._directory, told["model"], told["optimizer"])

    on_epoch_end = on_evaluate = on_step_end

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
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
        delete_replaced(self.directory.parent)


SMALL_CHECKPOINT = 512_000_000
"""Maximal bytes of a checkpoint that is written at the end by default, so that a run can be
extended."""


class SaveByClock(TrainerCallback):
    """Save a checkpoint after `minutes` of training without one, and from then on at the end.

    The first process's clock decides for all. With `last`, the end is saved in any case.
    """

    def __init__(self, minutes: float, processes: Processes, *, last: bool = False) -> None:
        self._seconds = minutes * 60
        self._processes = processes
        self._since = 0.0
        self._saves_end = last

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Save if the time is up, or at the end if it was up before."""
        is_time = self._processes.is_first and time.monotonic() - self._since >= self._seconds
        is_time = self._processes.any(is_time)
        self._saves_end |= is_time
        is_end = state.global_step >= state.max_steps
        control.should_save |= is_time or (is_end and self._saves_end)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Save at the end of a run that stops early."""
        is_early = control.should_training_stop and state.global_step < state.max_steps
        control.should_save |= is_early and self._saves_end

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Restart the clock."""
        self._since = time.monotonic()


class SaveStreamState(TrainerCallback):
    """Write the position of a stream into each checkpoint, before its manifest."""

    def __init__(self, rows: StreamedRows, directory: Path) -> None:
        self.rows = rows
        self.directory = directory

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Write the position from the first process, for all."""
        if not state.is_world_process_zero:  # it is the same in each
            return
        self.rows.save(self.directory / f"checkpoint-{state.global_step}", state.global_step)


class SaveRollout(TrainerCallback):
    """Call `save` with each checkpoint, before its manifest, for a rollout of several steps."""

    def __init__(self, save: Callable[[Path], None], directory: Path) -> None:
        self._save = save
        self._directory = directory

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Write the rollout of this process."""
        self._save(self._directory / f"checkpoint-{state.global_step}")


class WaitForBytes(TrainerCallback):
    """Delay checkpoints until all file digests are computed in the background."""

    def __init__(self, waits: Iterable[Callable[[], None]]) -> None:
        self._waits = list(waits)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Wait if a checkpoint follows."""
        if control.should_save:
            for wait in self._waits:
                wait()

    on_epoch_end = on_evaluate = on_step_end
