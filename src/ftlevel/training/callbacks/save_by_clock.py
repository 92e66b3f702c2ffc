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
        device: torch device type.
    """

    def __init__(self, minutes: float, processes: Processes, device: str) -> None:
        self._seconds = minutes * 60
        self._processes = processes
        self._device = device
        self._since = 0.0
        self._has_saved = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Start the clock; a run that goes on has a checkpoint already."""
        self._since, self._has_saved = time.monotonic(), state.global_step > 0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Save, if it is time, or the end of a run that was long enough to have a checkpoint."""
        is_time = self._processes.is_first and time.monotonic() - self._since >= self._seconds
        is_end = self._has_saved and state.global_step >= state.max_steps
        control.should_save |= self._processes.any(is_time, self._device) or is_end

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Start the clock again."""
        self._since, self._has_saved = time.monotonic(), True
