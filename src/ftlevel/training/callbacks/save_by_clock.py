"""Write a checkpoint when a long time went by without one."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.training.processes import Processes


class SaveByClock(TrainerCallback):
    """Ask for a checkpoint after so many minutes of training without one, and then at the end.

    The first process has the clock: all save after the same step.

    Args:
        minutes: since the last checkpoint, or the beginning.
        processes: those of the run.
    """

    def __init__(self, minutes: float, processes: Processes) -> None:
        self._seconds = minutes * 60
        self._processes = processes
        self._since = 0.0
        self._was_time = False

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
        is_end = self._was_time and state.global_step >= state.max_steps
        is_time = self._processes.any(is_time)
        self._was_time |= is_time
        control.should_save |= is_time or is_end

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Start the clock again."""
        self._since = time.monotonic()
