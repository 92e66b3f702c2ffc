"""Callbacks that watch a run: that it learns, that it stays finite, that it can be stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts import checkpoints
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.masking import MaskedRows
from ftlevel.data.prepare.sampling import LengthGroups
from ftlevel.data.prepare.streamed_rows import StreamedRows
from ftlevel.errors import RunError, listing
from ftlevel.events import Listener
from ftlevel.models.upstream.data import is_shared_order
from ftlevel.training.processes import Processes


class GradientProof(TrainerCallback):
    """Stop when a tensor that should learn gets no gradient, or a gradient is not finite.

    LoRA's A has an exactly zero gradient at first because B is zero; what is still zero after a
    step at a learning rate above zero (warm-up begins at zero) is reported as not learning.

    Attributes:
        checked: how many tensors had a gradient at the first step.
        idle: tensors whose gradient was zero at first and after the first real step.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.checked = 0
        self.idle: list[str] = []
        self._trainable: list[tuple[str, Any]] = []
        self._zero_first: set[str] | None = None
        self._has_moved = False
        self._is_settled = False

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Look at every gradient of the optimizer step that is about to be made."""
        if not self.checked:  # the first step of this process: a resumed run proves itself too
            self._trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            self._check_all_have_one(self._trainable)
        trainable = self._trainable
        if self._is_settled and self._are_finite():
            return
        sums = torch.stack([_absolute_sum(p.grad) for _, p in trainable])
        if not bool(torch.isfinite(sums).all()):
            bad = [n for (n, _), s in zip(trainable, sums, strict=True) if not torch.isfinite(s)]
            raise RunError(
                f"the gradient is not finite at step {state.global_step + 1} ({len(bad):,} of "
                f"{len(trainable):,} tensors, such as {bad[0]}). Training stopped before the "
                "weights took it. Lower --learning-rate, or use --dtype float32."
            )
        if not self._is_settled:
            zero = {n for (n, _), s in zip(trainable, sums, strict=True) if s == 0}
            self._look_for_idle(zero, len(trainable), optimizer)

    def _are_finite(self) -> bool:
        """Whether the norm of all gradients is, which one operation a group of tensors tells."""
        gradients = [p.grad for _, p in self._trainable if p.grad is not None]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))

    def _look_for_idle(self, zero: set[str], count: int, optimizer: Any) -> None:
        """Compare the tensors with a zero gradient before and after the first real step."""
        if self._zero_first is None:
            self._zero_first = zero
        elif self._has_moved:
            self._is_settled = True
            self.idle = sorted(zero & self._zero_first)
            if self.idle:
                self.listener.warn(
                    f"{len(self.idle):,} of {count:,} trainable tensors have a zero gradient "
                    f"after the first step too: {listing(self.idle, 3)}."
                )
        self._has_moved = any(group["lr"] > 0 for group in optimizer.param_groups)

    def _check_all_have_one(self, trainable: list[tuple[str, Any]]) -> None:
        missing = [name for name, parameter in trainable if parameter.grad is None]
        if missing:
            raise RunError(
                f"{len(missing):,} of {len(trainable):,} trainable tensors got no gradient at step "
                f"1: {listing(missing, 3)}. They would stay as they began. If the model does not "
                "use these modules for this task, name the others by --target-modules; else "
                "please report it with the command."
            )
        self.checked = len(trainable)


def _absolute_sum(gradient: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(()) if gradient is None else gradient.detach().abs().sum().float()


class Interrupt(TrainerCallback):
    """Turn the first Ctrl-C or SIGTERM into a checkpoint at the end of the step, then stop.

    A second one ends the process at once; of several processes, whose launcher passes on what the
    terminal has sent them already, it does not. Use as a context manager around training.

    Args:
        processes: those of the run, which stop after the same step.
        device: torch device type.

    Attributes:
        received: the signal's name, or empty.
    """

    def __init__(self, processes: Processes, device: str) -> None:
        self.received = ""
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
            control.should_save = True
            control.should_training_stop = True
        return control


class KeepStream(TrainerCallback):
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
        """Add it to the checkpoint that was just written."""
        self.rows.save(self.directory / f"checkpoint-{state.global_step}", state.global_step)


class Certify(TrainerCallback):
    """Give each checkpoint its manifest, and delete old ones only after that."""

    def __init__(self, directory: Path, keep: int, processes: Processes) -> None:
        self.directory = directory
        self.keep = keep
        self._processes = processes

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Certify the checkpoint that was just written."""
        self._processes.wait()  # each writes its random state
        if self._processes.is_first:
            checkpoints.certify(self.directory / f"checkpoint-{state.global_step}")
            checkpoints.rotate(self.directory, self.keep)


class FollowEpoch(TrainerCallback):
    """Tell rows, and their order, which epoch begins, also after a resumption."""

    def __init__(self, rows: Sequence[Encoded], order: Any) -> None:
        self.rows = rows
        self.order = order

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Set the epoch; Trainer takes the first row of it after this."""
        if isinstance(self.rows, MaskedRows):
            self.rows.epoch = int(state.epoch or 0)
        if isinstance(self.order, LengthGroups):
            self.order.epoch = int(state.epoch or 0)
        elif is_shared_order(self.order):
            self.order.set_epoch(int(state.epoch or 0))


class Report(TrainerCallback):
    """Pass the run's course to the listener and to metrics.jsonl.

    Attributes:
        records: everything that was logged.
        first_step_at: when the first step began, by `time.perf_counter`.
        first_step_cpu_s: the process's processor time until then, of all threads.
        step_seconds: time spent in optimizer steps, without evaluation and saving.
    """

    def __init__(
        self,
        listener: Listener,
        write: Callable[[Mapping[str, Any]], None],
        tokens_seen: Callable[[], int],
    ) -> None:
        self.listener = listener
        self.write = write
        self.tokens_seen = tokens_seen
        self.records: list[dict[str, Any]] = []
        self.first_step_at: float | None = None
        self.first_step_cpu_s = 0.0
        self.step_seconds = 0.0
        self._step_began = 0.0

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
        self._step_began = time.perf_counter()
        if self.first_step_at is None:
            self.first_step_at = self._step_began
            self.first_step_cpu_s = time.process_time()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Count a step."""
        self.step_seconds += time.perf_counter() - self._step_began
        self.listener.step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write one record: step, epoch, loss, learning_rate, grad_norm, tokens, elapsed_s."""
        logs = dict(logs or {})
        if "train_runtime" in logs:  # Trainer's own summary; ours has more
            return
        began = self.first_step_at or time.perf_counter()
        record = {
            "step": state.global_step,
            **logs,
            "tokens": self.tokens_seen(),
            "elapsed_s": round(time.perf_counter() - began, 3),
        }
        self.records.append(record)
        self.write(record)
        self.listener.log(record)
