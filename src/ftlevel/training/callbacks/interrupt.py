"""Stop a run between two steps, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.training.processes import Processes


class Interrupt(TrainerCallback):
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a checkpoint after the step, then stop.

    SIGUSR1, by which SLURM warns of the end of a job, makes the checkpoint and goes on. A second
    signal ends the process at once; of several processes, whose launcher passes on what the
    terminal has sent them already, it does not. Use as a context manager around training.

    Args:
        processes: those of the run, which stop after the same step.

    Attributes:
        received: the signal's name, or empty.
        exit_code: of a process that it ends, as shells have it.
        has_stopped: whether the run was ended by it; one that comes later finds the run at its end.
    """

    _SAVE, _STOP = 1, 2

    def __init__(self, processes: Processes) -> None:
        self.received = ""
        self.exit_code = 128 + signal.SIGINT
        self._wish = 0
        self.has_stopped = False
        self._processes = processes
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has not all of them
            if number is None or (
                name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN  # by nohup
            ):
                continue
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:  # not in the main thread: the caller's handlers stay
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGUSR1":
            self._wish = max(self._wish, self._SAVE)
            return
        if self.received and self._processes.count == 1:
            before = self._before.get(number)
            if callable(before):
                before(number, frame)
            raise KeyboardInterrupt
        self.received, self.exit_code, self._wish = name, 128 + number, self._STOP

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        """Save, and stop, if a signal has come and the run is not over anyway."""
        # What was agreed on counts, not what has come since: all stop after the same step.
        wish = self._processes.most(self._wish)
        if wish and state.global_step < state.max_steps:
            control.should_save = True
            self._wish = 0
        if wish == self._STOP and state.global_step < state.max_steps:
            self.received = self.received or "of another process"
            self.has_stopped = True
            control.should_training_stop = True
        return control
