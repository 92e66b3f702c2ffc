"""Pass on what happens in a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.events import Listener


class Report(TrainerCallback):
    """Pass the run's course to the listener, to metrics.jsonl and to trackers.

    Attributes:
        writers: what takes each record.
        records: everything that was logged, before a resumed part too.
        first_step_at: when the first step began, by `time.perf_counter`.
        first_step_cpu_s: the process's processor time until then, of all threads.
        train_s: seconds since the first step began, without evaluation and saving.
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
        self._seen_at: float | None = None  # in a pause

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Say how many steps there are."""
        self.listener.begin(state.max_steps)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Note when the step begins."""
        if self._seen_at is None:
            self._seen_at = time.perf_counter()
        if self.first_step_at is None:
            self.first_step_at = self._seen_at
            self.first_step_cpu_s = time.process_time()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Count a step."""
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
        """Write one record: step, epoch, loss, rate, gradient norm, tokens, seconds and memory.

        `elapsed_s` is all that went by, `train_s` that without evaluation and saving.
        """
        logs = dict(logs or {})
        if "train_runtime" in logs:  # Trainer's own summary; ours has more
            return
        if not any(name.startswith("eval_") for name in logs):
            self._count()  # the loss was read: a GPU has done what it was given
        began = self.first_step_at or time.perf_counter()
        record = {
            "step": state.global_step,
            **logs,
            "tokens": self.tokens_seen(),
            "elapsed_s": round(time.perf_counter() - began, 3),
            "train_s": round(self.train_s, 3),
            "memory_bytes": self.memory(),
        }
        self.records.append(record)
        for write in self.writers:
            write(record)
        self.listener.log(record)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Leave an evaluation, or a checkpoint and what certifies it, out of the training time."""
        self._seen_at = None

    on_save = on_evaluate

    def _count(self) -> None:
        """Add what went by since it was last seen to the training time, but for a pause."""
        if self._seen_at is not None:
            now = time.perf_counter()
            self.train_s += now - self._seen_at
            self._seen_at = now
