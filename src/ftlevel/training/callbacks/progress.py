"""Callbacks for progress reports, signals, resumed settings, and the current epoch."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.data.encoding.collate import MaskedRows
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.prepare.sampling import DistinctTextSampler, LengthGroupedSampler
from ftlevel.events import Listener
from ftlevel.models.upstream.libraries import shared_order
from ftlevel.training.processes import Processes


class Report(TrainerCallback):
    """Send the progress of a run to the listener, metrics.jsonl and trackers.

    Attributes:
        records: everything that was logged, including before a resume.
        first_step_at: start of the first step, by `time.perf_counter`.
        first_step_cpu_s: CPU seconds of all threads until then.
        train_s: seconds since the first step, without evaluation and saving.
    """

    def __init__(
        self,
        listener: Listener,
        write: Callable[[Mapping[str, Any]], None],
        tokens_seen: Callable[[], int],
        memory: Callable[[], int],
    ) -> None:
        self.listener = listener
        self.writers = [write]
        self.tokens_seen = tokens_seen
        self.memory = memory
        self.records: list[dict[str, Any]] = []
        self.first_step_at: float | None = None
        self.first_step_cpu_s = 0.0
        self.train_s = 0.0
        self._seen_at: float | None = None  # None in a pause

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Report the number of steps."""
        self.listener.begin(state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record the start time of the step."""
        if self._seen_at is None:
            self._seen_at = time.perf_counter()
        if self.first_step_at is None:
            self.first_step_at = self._seen_at
            self.first_step_cpu_s = time.process_time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the step's time, and report the step."""
        self._count()
        self.listener.step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write a record: step, epoch, loss, rate, gradient norm, tokens, seconds and memory.

        `elapsed_s` includes evaluation and saving, `train_s` does not.
        """
        logs = dict(logs or {})
        if "train_runtime" in logs:  # Trainer's own summary; ours has more
            return
        if not any(name.startswith("eval_") for name in logs):
            self._count()  # reading the loss synchronized the GPU
        start = self.first_step_at or time.perf_counter()
        record = {
            "step": state.global_step,
            **logs,
            "tokens": self.tokens_seen(),
            "elapsed_s": round(time.perf_counter() - start, 3),
            "train_s": round(self.train_s, 3),
            "memory_bytes": self.memory(),
        }
        self.records.append(record)
        for write in self.writers:
            write(record)
        self.listener.log(record)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Exclude the evaluation, or the saving of a checkpoint, from the training time."""
        self._seen_at = None

    on_save = on_evaluate

    def _count(self) -> None:
        """Add the time since the last call to the training time, unless paused."""
        if self._seen_at is not None:
            now = time.perf_counter()
            self.train_s += now - self._seen_at
            self._seen_at = now


class Interrupt(TrainerCallback):
    """Save a checkpoint after the current step and stop, on Ctrl-C, SIGTERM or SIGHUP.

    On SIGUSR1, which SLURM sends before the end of a job, training continues after the checkpoint.
    A second signal ends a single process at once. Several processes ignore it, because launchers
    forward signals that the terminal has already sent. Use as a context manager around training.
    `exit_code` is 128 + signal number; `has_stopped` is false if the run ended by itself.
    """

    _SAVE, _STOP = 1, 2

    def __init__(self, processes: Processes) -> None:
        self.received = ""
        self.exit_code = 128 + signal.SIGINT
        self._action = 0
        self.has_stopped = False
        self._processes = processes
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows lacks some
            if number is None or (
                name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN  # by nohup
            ):
                continue
            try:
                self._handlers[number] = signal.signal(number, self._receive)
            except ValueError:  # not in the main thread: the caller's handlers stay
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGUSR1":
            self._action = max(self._action, self._SAVE)
            return
        if self.received and self._processes.count == 1:
            handler = self._handlers.get(number)
            if callable(handler):
                handler(number, frame)
            raise KeyboardInterrupt
        self.received, self.exit_code, self._action = name, 128 + number, self._STOP

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save, and stop, if any process received a signal before the last step."""
        # Use the agreed value, not later signals, so that all stop after the same step.
        action = self._processes.most(self._action)
        if action and state.global_step < state.max_steps:
            control.should_save = True
            self._action = 0
        if action == self._STOP and state.global_step < state.max_steps:
            self.received = self.received or "of another process"
            self.has_stopped = True
            control.should_training_stop = True
        return control


class FollowSettings(TrainerCallback):
    """Use intervals and learning rates of the settings, not those of the checkpoint.

    On resume Trainer restores both. In a run made longer, the next step would use the old
    schedule's rate, such as 0 at the end of a linear one. Without changes the values are the same.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Set intervals and learning rates when a run resumes."""
        if state.global_step == 0:
            return
        state.compute_steps(args, state.max_steps)
        if not hasattr(lr_scheduler, "lr_lambdas"):
            return  # reduce_lr_on_plateau: its rate depends on past losses
        rates = [
            base * share(lr_scheduler.last_epoch)
            for base, share in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), "_last_lr": rates})  # is logged


class SetEpoch(TrainerCallback):
    """Set the epoch of the rows and their sampler, also after a resume."""

    def __init__(self, rows: Sequence[Encoded], order: Any) -> None:
        self.rows = rows
        self.order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Set the epoch before Trainer reads its first row."""
        if isinstance(self.rows, MaskedRows):
            self.rows.epoch = int(state.epoch or 0)
        if isinstance(self.order, LengthGroupedSampler | DistinctTextSampler):
            self.order.epoch = int(state.epoch or 0)
        elif isinstance(self.order, shared_order()):
            self.order.set_epoch(int(state.epoch or 0))
