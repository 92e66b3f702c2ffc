"""Stop or recover a run with missing, non-finite or unusual gradients, losses or weights.

A step with a non-finite value or a loss spike stops the run, is skipped, or rolls weights and
optimizer back to the latest complete checkpoint, as in PaLM's training (Chowdhery et al., 2022, §
5.1). The schedule and the order of rows continue unchanged.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.files import read_json, write_json
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config.trainer import TrainerConfig
from ftlevel.errors import RunError, join_names
from ftlevel.events import Listener
from ftlevel.models.upstream.shards import whole
from ftlevel.training.processes import Processes
from ftlevel.training.trainer import FtlevelTrainer

_WINDOW = 20  # losses in the median
_MIN_LOSSES = 5  # losses needed before spikes are detected
_MAX_CONSECUTIVE = 10  # consecutive steps that may be skipped
_MAX_LISTED = 8  # rows of a step listed in a message
_FILE_NAME = "losses.json"  # in a checkpoint


class Recovery(TrainerCallback):
    """Callback that stops at, skips or rolls back steps with non-finite values or loss spikes."""

    def __init__(
        self,
        trainer: FtlevelTrainer,
        train: TrainerConfig,
        output_dir: RunDirectory,
        processes: Processes,
        listener: Listener,
        checkpoint: Path | None,
    ) -> None:
        self._trainer = trainer
        self._action = train.on_nonfinite
        self._factor = train.spike_factor
        self._output_dir = output_dir
        self._processes = processes
        self._listener = listener
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._num_failures, self._last = 0, 0
        path = checkpoint / _FILE_NAME if checkpoint is not None else None
        # Absent if the run began without spike_factor; the median then starts here.
        if self._factor is not None and path is not None and path.exists():
            self._losses.extend(read_json(path, list))

    @property
    def is_always_fatal(self) -> bool:
        """Whether every failed step ends the run, so that checks may come some steps late."""
        return self._action == "stop" and self._factor is None

    def mean_loss(self, loss: float) -> float:
        """Returns the mean of `loss` over all processes, so that all make the same decision."""
        return self._processes.mean(loss)

    def decide(self, step: int, problem: str, advice: str, *, in_weights: bool = False) -> None:
        """Skip the step, roll back to a checkpoint, or raise RunError, as configured.

        `problem` and `advice` are sentences of the message. With `in_weights`, the weights are
        already updated, so the step cannot be skipped.
        """
        action = self._action
        if action == "stop" or (action == "skip" and in_weights):
            raise RunError(
                f"{problem}.{self._rows_message()} {advice} {self._checkpoint_message()}"
            )
        if action == "rollback":
            self._roll_back(step, problem)
        else:
            self._skip_step(step, problem, "skipped")

    def check_spike(self, step: int, loss: float) -> None:
        """Roll back, or skip without a checkpoint, if `loss` > `spike_factor` · recent median."""
        if self._factor is None:
            return
        median = statistics.median(self._losses) if len(self._losses) >= _MIN_LOSSES else None
        if median is None or loss <= self._factor * median:
            self._losses.append(loss)
            return
        problem = (
            f"the loss is {loss:.4g} at step {step}, more than {self._factor:g} times the usual "
            f"{median:.4g}"
        )
        if self._last_checkpoint() is None:
            self._skip_step(step, problem, "skipped")
        else:
            self._roll_back(step, problem)

    def _roll_back(self, step: int, problem: str) -> None:
        checkpoint = self._last_checkpoint()
        if checkpoint is None:
            raise RunError(
                f"{problem}.{self._rows_message()} --on-nonfinite rollback has no checkpoint to go "
                "back to yet. Save more often (--save-steps), or use --on-nonfinite skip."
            )
        self._trainer.restore(checkpoint)
        self._skip_step(step, problem, f"rolled back to {checkpoint.name}")

    def _skip_step(self, step: int, problem: str, action: str) -> None:
        self._num_failures = self._num_failures + 1 if step == self._last + 1 else 1
        self._last = step
        if self._num_failures > _MAX_CONSECUTIVE:
            raise RunError(
                f"{problem}, as in the {_MAX_CONSECUTIVE} steps before, which were skipped. "
                f"Lower --learning-rate, or use --dtype float32. {self._checkpoint_message()}"
            )
        self._trainer.drop_gradient()
        note = {"step": step, "what": problem, "how": action, "rows": self._trainer.step_rows}
        if self._processes.is_first:
            self._output_dir.note(note)
        self._listener.warn(f"{problem}: {action}.{self._rows_message()}")

    def _last_checkpoint(self) -> Path | None:
        return self._processes.from_first(
            lambda: checkpoints.get_last_valid_checkpoint(self._output_dir.checkpoints)[0]
        )

    def _rows_message(self) -> str:
        rows = sorted(row + 1 for row in self._trainer.step_rows)
        return f" It had the rows {join_names(map(str, rows), _MAX_LISTED)}." if rows else ""

    def _checkpoint_message(self) -> str:
        checkpoint = self._last_checkpoint()
        return f"{checkpoint} is whole." if checkpoint else "There is no checkpoint yet."

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the recent losses into the checkpoint, before its manifest."""
        if self._factor is not None and self._processes.is_first:
            path = self._output_dir.checkpoints / f"checkpoint-{state.global_step}" / _FILE_NAME
            write_json(path, list(self._losses))


_STOPPED = "Training stopped before the weights were updated."

MAX_SKIPPED = 20
"""Maximal number of consecutive steps that float16 may skip: from the first scale, 65,536, to
1/16."""

LATEST = 16
"""Maximal number of steps before the deferred checks of a GPU are read."""


class GradientMonitor(TrainerCallback):
    """Callback that stops if a gradient is missing, and calls `recovery` if a value is not finite.

    Checks loss, gradients and weights of every step. `delays_checks` needs a `recovery` that always
    stops: results are read every few steps, to synchronize the GPU less, before anything is logged,
    evaluated or saved, and raise `RunError`. With `uses_scaler`, a float16 overflow is expected:
    the scaler skips the step and halves its scale, and only many overflows in a row stop the run.

    Attributes:
        checked: number of trainable tensors with a gradient.
        idle: names of tensors whose gradient is zero both before and after the first weight update.
            (Before it, LoRA's A always has a zero gradient, because B is zero.)
        skipped: number of steps skipped by the gradient scaler.
    """

    def __init__(
        self,
        listener: Listener,
        step_loss: Callable[[], Tensor],
        recovery: Recovery,
        *,
        uses_scaler: bool = False,
        delays_checks: bool = False,
    ) -> None:
        self.listener = listener
        self.recovery = recovery
        self.step_loss = step_loss
        self.checked = 0
        self.idle: list[str] = []
        self.skipped = 0
        self._num_failures = 0
        self._uses_scaler, self._delays_checks = uses_scaler, delays_checks and not uses_scaler
        self._deferred: list[tuple[int, str, Tensor]] = []
        self._trainable: list[tuple[str, Any]] = []
        self._zero_first: set[str] | None = None
        self._has_updated = False
        self._is_finished = False

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Check the loss and all gradients before the optimizer step."""
        if not self.checked:  # first step of this process, also after a resume
            self._trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            self._check_missing_gradients(self._trainable)
        trainable, step = self._trainable, state.global_step + 1
        if self._is_finished and self._delays_checks:
            self._queue_check(state, "loss", self.step_loss())
            self._queue_check(state, "gradient", _max_abs(p.grad for _, p in trainable))
            return
        loss = self.recovery.mean_loss(float(self.step_loss()))
        if not math.isfinite(loss):
            self.recovery.decide(
                step,
                f"the loss is {loss} at step {step}",
                f"{_STOPPED} Lower --learning-rate, or use --dtype float32.",
            )
            return
        sums: dict[str, Tensor] = {}
        if not (self._is_finished and are_finite(p.grad for _, p in trainable)):
            sums = {name: _absolute_sum(p.grad) for name, p in trainable}
        if names := [name for name, value in sums.items() if not torch.isfinite(value)]:
            if self._uses_scaler:
                self._skip(step)
                return
            self.recovery.decide(
                step,
                f"the gradient is not finite at step {step} ({len(names):,} of {len(trainable):,} "
                f"tensors, such as {names[0]})",
                f"{_STOPPED} Lower --learning-rate, or use --dtype float32.",
            )
            return
        self._num_failures = 0
        self.recovery.check_spike(step, loss)
        if not self._is_finished:
            zero = {name for name, value in sums.items() if value == 0}
            self._check_zero_gradients(zero, len(trainable), optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check all trainable tensors after the optimizer step."""
        if self._is_finished and self._delays_checks:
            self._queue_check(state, "weights", _max_abs(p for _, p in self._trainable))
            return
        if are_finite(p for _, p in self._trainable):
            return
        names = [name for name, p in self._trainable if not bool(torch.isfinite(whole(p)).all())]
        if names:  # the norm of finite weights may overflow
            step = state.global_step + 1
            self.recovery.decide(
                step,
                f"{len(names):,} of {len(self._trainable):,} trained tensors are not finite after "
                f"step {step}, such as {names[0]}",
                "Nothing was saved. Lower --learning-rate, or use another --optim.",
                in_weights=True,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Read deferred checks before logging, evaluation and saving, and every `LATEST` steps."""
        is_due = control.should_log or control.should_evaluate or control.should_save
        if is_due or control.should_training_stop or state.global_step % LATEST == 0:
            self._check_deferred(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Read deferred checks before the checkpoint gets its manifest."""
        self._check_deferred(state)

    def _queue_check(self, state: TrainerState, name: str, value: Tensor) -> None:
        self._deferred.append((state.global_step + 1, name, value.detach().float()))

    def _check_deferred(self, state: TrainerState) -> None:
        if not self._deferred:
            return
        mask = torch.isfinite(torch.stack([value for _, _, value in self._deferred])).tolist()
        invalid = [
            noted for noted, is_finite in zip(self._deferred, mask, strict=True) if not is_finite
        ]
        self._deferred = []
        if invalid:
            step, name, _ = invalid[0]
            verb = "are" if name == "weights" else "is"
            raise RunError(
                f"the {name} {verb} not finite at step {step}, checked every {LATEST} steps on a "
                f"GPU: this is step {state.global_step}. Nothing since then is saved. Lower "
                "--learning-rate, or use --dtype float32."
            )

    def _skip(self, step: int) -> None:
        self.skipped += 1
        self._num_failures += 1
        if self._num_failures >= MAX_SKIPPED:
            raise RunError(
                f"float16 overflows: the last {MAX_SKIPPED} steps up to step {step} were skipped, "
                "each with half the scale of the one before. Lower --learning-rate, or use --dtype "
                "bfloat16 or float32."
            )
        if self.skipped == 1:
            self.listener.warn(
                f"float16 overflowed at step {step}, which is skipped, and its scale is halved: "
                "usual at first. summary.json counts them as proof.skipped_steps."
            )

    def _check_zero_gradients(self, zero: set[str], num_tensors: int, optimizer: Any) -> None:
        """Warn once of tensors in `zero` whose gradient was zero before the first update, too."""
        if len(zero) == num_tensors:
            return
        if self._zero_first is None:
            self._zero_first = zero
        elif self._has_updated:
            self._is_finished = True
            self.idle = sorted(zero & self._zero_first)
            # A bias added to all scores has a zero gradient in ranking losses.
            if unused := [n for n, p in self._trainable if n in self.idle and p.numel() > 1]:
                self.listener.warn(
                    f"{len(unused):,} of {num_tensors:,} trainable tensors had only zero gradients "
                    f"so far: {join_names(unused, 3)}. They were not trained."
                )
        self._has_updated = any(group["lr"] > 0 for group in optimizer.param_groups)

    def _check_missing_gradients(self, trainable: list[tuple[str, Any]]) -> None:
        missing = [name for name, parameter in trainable if parameter.grad is None]
        if missing:
            raise RunError(
                f"{len(missing):,} of {len(trainable):,} trainable tensors got no gradient at step "
                f"1: {join_names(missing, 3)}. They would keep their initial values. If the model "
                "does not use these modules for this task, name the others by --target-modules; "
                "else please report it with the command."
            )
        self.checked = len(trainable)


def are_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Returns whether the total norm of `tensors` is finite; also False if that sum overflows."""
    grads = [tensor.detach() for tensor in tensors if tensor is not None]
    return bool(torch.isfinite(whole(torch.nn.utils.get_total_norm(grads))))


def _max_abs(tensors: Iterable[Tensor | None]) -> Tensor:
    grads = [tensor.detach() for tensor in tensors if tensor is not None]
    return whole(torch.nn.utils.get_total_norm(grads, norm_type=math.inf))


def _absolute_sum(gradient: Tensor | None) -> Tensor:
    return torch.zeros(()) if gradient is None else whole(gradient.detach().abs().sum()).float()
