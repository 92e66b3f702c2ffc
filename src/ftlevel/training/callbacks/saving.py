"""Make checkpoints that can be trusted and used, where there is room, and delete old ones.

Write a checkpoint when a long time went by without one, and a last one.

Keep where a stream is beside the checkpoint.

No checkpoint before it is known on which bytes of the base, and of a stream, it was trained.
"""

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
    """Give each checkpoint its manifest, and delete old ones, and an old run, only after that.

    Args:
        run: its directory.
        keep: how many checkpoints stay.
        write_beside: writes into a checkpoint what it takes to use it; None where it cannot be.
        processes: those of the run.
        when_written: does what it is given when all of a checkpoint is written; None is at once.
    """

    def __init__(
        self,
        run: RunDirectory,
        keep: int,
        write_beside: Callable[[Path], None] | None,
        processes: Processes,
        when_written: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self.directory = run.checkpoints
        self.keep = keep
        self._write_beside = write_beside
        self._run = run
        self._processes = processes
        self._when_written = when_written

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **told: Any,
    ) -> None:
        """Look whether the disk has room for the checkpoint that comes."""
        if control.should_save and self._processes.is_first:
            check_room_to_save(self._run, told["model"], told["optimizer"])

    on_epoch_end = on_evaluate = on_step_end

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Certify the checkpoint that was just written, or when it is."""
        self._processes.wait()  # each writes its random state
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
"""Bytes up to which a last checkpoint is written, so that a run can be made longer."""


class SaveByClock(TrainerCallback):
    """Ask for a checkpoint after so many minutes of training without one, and then at the end.

    The first process has the clock: all save after the same step.

    Args:
        minutes: since the last checkpoint, or the beginning.
        processes: those of the run.
        last: ask for one at the end whatever the clock says.
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
        """Save, if it is time, or the end of a run for which it was time before."""
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
        """Save the end of a run that stops early."""
        is_early = control.should_training_stop and state.global_step < state.max_steps
        control.should_save |= is_early and self._saves_end

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Start the clock again."""
        self._since = time.monotonic()


class SaveStreamState(TrainerCallback):
    """Write where a stream is into each checkpoint, before it is certified."""

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
        """Add it to the checkpoint that was just written; the first process does, for all."""
        if not state.is_world_process_zero:  # it is the same in each
            return
        self.rows.save(self.directory / f"checkpoint-{state.global_step}", state.global_step)


class WaitForBytes(TrainerCallback):
    """Let the first checkpoint wait until all files were read beside the steps.

    Args:
        waits: wait for one of them.
    """

    def __init__(self, waits: Iterable[Callable[[], None]]) -> None:
        self._waits = list(waits)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Wait, where a checkpoint comes."""
        if control.should_save:
            for wait in self._waits:
                wait()

    on_epoch_end = on_evaluate = on_step_end
