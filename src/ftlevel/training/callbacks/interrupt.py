"""Stop a run between two steps, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.training.processes import Processes


class Interrupt(TrainerCallback):
    """Turn the first Ctrl-C or SIGTERM into a checkpoint at the end of the step, then stop.

    A second one ends the process at once; of several processes, whose launcher passes on what the
    terminal has sent them already, it does not. Use as a context manager around training.

    Args:
        processes: those of the run, which stop after the same step.
        device: torch device type.

    Attributes:
        received: the signal's name, or empty.
        has_stopped: whether the run was ended by it; one that comes later finds the run at its end.
    """

    def __init__(self, processes: Processes, device: str) -> None:
        self.received = ""
        self.has_stopped = False
        self._processes = processes
        self._device = device
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:  # not in the main thread: the caller's handlers stay
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and self._processes.count == 1:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        """Save and stop, if a signal has come and the run is not over anyway."""
        # What was agreed on counts, not what has come since: all stop after the same step.
        is_over = self._processes.any(bool(self.received), self._device)
        if is_over and state.global_step < state.max_steps:
            self.received = self.received or "of another process"
            self.has_stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control
