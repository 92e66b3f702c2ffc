"""Write a checkpoint when a long time went by without one, and a last one."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.training.processes import Processes

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
