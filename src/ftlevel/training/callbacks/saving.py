"""Make checkpoints that can be trusted and used, where there is room, and delete old ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.best_models import rotate_best
from ftlevel.artifacts.ownership import delete_replaced
from ftlevel.artifacts.run_directory import RunDirectory
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
