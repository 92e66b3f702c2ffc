"""Stop or recover a run with missing, non-finite or unusual gradients, losses or weights.

A step with a non-finite value or a loss spike stops the run, is skipped, or rolls weights and
optimizer back to the latest complete checkpoint, as in PaLM's training (Chowdhery et al., 2022, §
5.1). The schedule and the order of rows continue unchanged.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.files import write_json
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config.trainer import TrainerConfig
from ftlevel.errors import RunError, join_names
from ftlevel.events import Listener
from ftlevel.models.upstream.shards import whole
from ftlevel.training.processes import Processes
from ftlevel.training.trainer import FtlevelTrainer

_MEMORY = 20  # losses in the median
_KNOWN = 5  # losses needed before spikes are detected
_PATIENCE = 10  # consecutive steps that may be skipped
_SHOWN = 8  # rows of a step listed in a message
_LOSSES = "losses.json"  # in a checkpoint


class Recovery(TrainerCallback):
    """Handle a step with a non-finite value or a loss spike, and record what was done."""

    def __init__(
        self,
        trainer: FtlevelTrainer,
        train: TrainerConfig,
        directory: RunDirectory,
        processes: Processes,
        listener: Listener,
        checkpoint: Path | None,
    ) -> None:
        self._trainer = trainer
        self._action = train.on_nonfinite
        self._factor = train.spike_factor
        self._directory = directory
        self._processes = processes
        self._listener = listener
        self._losses: deque[float] = deque(maxlen=_MEMORY)
        self._consecutive, self._last = 0, 0
        stored = checkpoint / _LOSSES if checkpoint is not None else None
        # Absent if the run began without spike_factor; the median then starts here.
        if self._factor is not None and stored is not None and stored.exists():
            self._losses.extend(json.loads(stored.read_text(encoding="utf-8")))

    @property
    def stops(self) -> bool:
        """Whether a step with non-finite values ends the run."""
        return self._action == "stop"

    @property
    def only_stops(self) -> bool:
        """Whether every failed step ends the run; checks may then come some steps late."""
        return self.stops and self._factor is None

    def agree(self, is_wrong: bool) -> bool:
        """Returns whether `is_wrong` is true in any process."""
        return self._processes.any(is_wrong)

    def decide(self, step: int, problem: str, advice: str, *, in_weights: bool = False) -> None:
        """Skip the step, roll back to a checkpoint, or raise RunError, as configured.

        `problem` and `advice` are sentences of the message. With `in_weights`, the weights are
        already updated, so the step cannot be skipped.
        """
        action = self._action
        if action == "stop" or (action == "skip" and in_weights):
            raise RunError(f"{problem}.{self._rows()} {advice} {self._describe_newest()}")
        if action == "rollback":
            self._roll_back(step, problem)
        else:
            self._skip_step(step, problem, "skipped")

    def look_for_spike(self, step: int, loss: float) -> None:
        """Skip or roll back a step whose `loss` exceeds `spike_factor` times the recent median.

        More than `_PATIENCE` consecutive such steps raise RunError.
        """
        if self._factor is None:
            return
        loss = self._processes.mean(loss)
        median = statistics.median(self._losses) if len(self._losses) >= _KNOWN else None
        if median is None or loss <= self._factor * median:
            self._losses.append(loss)
            return
        problem = (
            f"the loss is {loss:.4g} at step {step}, more than {self._factor:g} times the usual "
            f"{median:.4g}"
        )
        if self._newest() is None:
            self._skip_step(step, problem, "skipped")
        else:
            self._roll_back(step, problem)

    def _roll_back(self, step: int, problem: str) -> None:
        checkpoint = self._newest()
        if checkpoint is None:
            raise RunError(
                f"{problem}.{self._rows()} --on-nonfinite rollback has no checkpoint to go back to "
                "yet. Save more often (--save-steps), or use --on-nonfinite skip."
            )
        self._trainer.restore(checkpoint)
        self._skip_step(step, problem, f"rolled back to {checkpoint.name}")

    def _skip_step(self, step: int, problem: str, action: str) -> None:
        self._consecutive = self._consecutive + 1 if step == self._last + 1 else 1
        self._last = step
        if self._consecutive > _PATIENCE:
            raise RunError(
                f"{problem}, as in the {_PATIENCE} steps before, which were skipped. "
                f"Lower --learning-rate, or use --dtype float32. {self._describe_newest()}"
            )
        self._trainer.drop_gradient()
        note = {"step": step, "what": problem, "how": action, "rows": self._trainer.step_rows}
        if self._processes.is_first:
            self._directory.note(note)
        self._listener.warn(f"{problem}: {action}.{self._rows()}")

    def _newest(self) -> Path | None:
        return self._processes.from_first(
            lambda: checkpoints.get_last_valid_checkpoint(self._directory.checkpoints)[0]
        )

    def _rows(self) -> str:
        """Returns a sentence that lists the step's training rows, numbered from 1."""
        numbers = sorted(row + 1 for row in self._trainer.step_rows)
        return f" It had the rows {join_names(map(str, numbers), _SHOWN)}." if numbers else ""

    def _describe_newest(self) -> str:
        newest = self._newest()
        return f"{newest} is whole." if newest else "There is no checkpoint yet."

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the recent losses into the checkpoint, before its manifest."""
        if self._factor is not None and self._processes.is_first:
            path = self._directory.checkpoints / f"checkpoint-{state.global_step}" / _LOSSES
            write_json(path, list(self._losses))


def select_skipped_steps(notes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records in `notes` that are about skipped or rolled-back steps."""
    return [note for note in notes if "how" in note]


_STOPPED = "Training stopped before the weights took it."

MOST_SKIPPED = 20
"""Maximal number of consecutive steps that float16 may skip: from the first scale, 65,536, to
1/16."""

LATEST = 16
"""Maximal number of steps before the deferred checks of a GPU are read."""


class GradientMonitor(TrainerCallback):
    """Stop if a trainable tensor gets no gradient, or a loss, gradient or weight is not finite.

    Checks every step. With `defers`, the results of several steps are read together to avoid a GPU
    synchronization per step, but before anything is logged, evaluated or saved. A float16 overflow
    is expected: the scaler skips the step and halves its scale. Only many overflows in a row stop
    the run. LoRA's A has a zero gradient at first because B is zero. Tensors whose gradient is
    still zero after a step with a positive learning rate are reported, and listed in `idle`.
    """

    def __init__(
        self,
        listener: Listener,
        step_loss: Callable[[], Tensor],
        recovery: Recovery,
        *,
        scales: bool = False,
        defers: bool = False,
    ) -> None:
        self.listener = listener
        self.recovery = recovery
        self.step_loss = step_loss
        self.checked = 0
        self.idle: list[str] = []
        self.skipped = 0
        self._consecutive = 0
        self._scales, self._defers = scales, defers and not scales
        self._deferred: list[tuple[int, str, Tensor]] = []
        self._trainable: list[tuple[str, Any]] = []
        self._zero_first: set[str] | None = None
        self._has_moved = False
        self._is_checked = False

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
            self._check_all_have_one(self._trainable)
        trainable, step = self._trainable, state.global_step + 1
        if self._is_checked and self._defers:
            self._defer(state, "loss", self.step_loss())
            self._defer(state, "gradient", _largest(p.grad for _, p in trainable))
            return
        loss = float(self.step_loss())
        is_wrong = not math.isfinite(loss)
        if is_wrong or (not self.recovery.stops and self.recovery.agree(is_wrong)):
            self.recovery.decide(
                step,
                f"the loss is {loss} at step {step}",
                f"{_STOPPED} Lower --learning-rate, or use --dtype float32.",
            )
            return
        if self._is_checked and are_finite(p.grad for _, p in trainable):
            self._consecutive = 0
            self.recovery.look_for_spike(step, loss)
            return
        sums = torch.stack([_absolute_sum(p.grad) for _, p in trainable])
        if not bool(torch.isfinite(sums).all()):
            if self._scales:
                self._skip(state.global_step + 1)
                return
            wrong = [n for (n, _), s in zip(trainable, sums, strict=True) if not torch.isfinite(s)]
            self.recovery.decide(
                step,
                f"the gradient is not finite at step {step} ({len(wrong):,} of "
                f"{len(trainable):,} "
                f"tensors, such as {wrong[0]})",
                f"{_STOPPED} Lower --learning-rate, or use --dtype float32.",
            )
            return
        self._consecutive = 0
        self.recovery.look_for_spike(step, loss)
        if not self._is_checked:
            zero = {n for (n, _), s in zip(trainable, sums, strict=True) if s == 0}
            self._look_for_idle(zero, len(trainable), optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check all trainable tensors after the optimizer step."""
        if self._is_checked and self._defers:
            self._defer(state, "weights", _largest(p for _, p in self._trainable))
            return
        if are_finite(p for _, p in self._trainable):
            return
        wrong = [name for name, p in self._trainable if not bool(torch.isfinite(whole(p)).all())]
        if wrong:  # the norm of finite weights may overflow
            step = state.global_step + 1
            self.recovery.decide(
                step,
                f"{len(wrong):,} of {len(self._trainable):,} trained tensors are not finite "
                f"after "
                f"step {step}, such as {wrong[0]}",
                "Nothing was saved. Lower --learning-rate, or use another --optim.",
                in_weights=True,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Read deferred checks before logging, evaluation and saving, and every `LATEST` steps."""
        waits = control.should_log or control.should_evaluate or control.should_save
        if waits or control.should_training_stop or state.global_step % LATEST == 0:
            self._check_deferred(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Read deferred checks before the checkpoint gets its manifest."""
        self._check_deferred(state)

    def _defer(self, state: TrainerState, name: str, value: Tensor) -> None:
        self._deferred.append((state.global_step + 1, name, value.detach().float()))

    def _check_deferred(self, state: TrainerState) -> None:
        """Synchronize with the device, and raise RunError if a value is not finite."""
        if not self._deferred:
            return
        finite = torch.isfinite(torch.stack([value for _, _, value in self._deferred])).tolist()
        wrong = [
            noted for noted, is_finite in zip(self._deferred, finite, strict=True) if not is_finite
        ]
        self._deferred = []
        if wrong:
            step, name, _ = wrong[0]
            verb = "are" if name == "weights" else "is"
            raise RunError(
                f"the {name} {verb} not finite at step {step}, checked every {LATEST} steps on a "
                f"GPU: this is step {state.global_step}. Nothing since then is saved. Lower "
                "--learning-rate, or use --dtype float32."
            )

    def _skip(self, step: int) -> None:
        """Count a step that the gradient scaler skips; raise RunError after too many in a row."""
        self.skipped += 1
        self._consecutive += 1
        if self._consecutive >= MOST_SKIPPED:
            raise RunError(
                f"float16 overflows: the last {MOST_SKIPPED} steps up to step {step} were skipped, "
                "each with half the scale of the one before. Lower --learning-rate, or use --dtype "
                "bfloat16 or float32."
            )
        if self.skipped == 1:
            self.listener.warn(
                f"float16 overflowed at step {step}, which is skipped, and its scale is halved: "
                "usual at first. summary.json counts them as proof.skipped_steps."
            )

    def _look_for_idle(self, zero: set[str], count: int, optimizer: Any) -> None:
        """Warn about tensors whose gradient is zero before and after the first weight update.

        Steps without any gradient, such as those without a reward signal, do not count.
        """
        if len(zero) == count:
            return
        if self._zero_first is None:
            self._zero_first = zero
        elif self._has_moved:
            self._is_checked = True
            self.idle = sorted(zero & self._zero_first)
            if self.idle:
                self.listener.warn(
                    f"{len(self.idle):,} of {count:,} trainable tensors have a zero gradient "
                    f"after the first step too: {join_names(self.idle, 3)}."
                )
        self._has_moved = any(group["lr"] > 0 for group in optimizer.param_groups)

    def _check_all_have_one(self, trainable: list[tuple[str, Any]]) -> None:
        missing = [name for name, parameter in trainable if parameter.grad is None]
        if missing:
            raise RunError(
                f"{len(missing):,} of {len(trainable):,} trainable tensors got no gradient at step "
                f"1: {join_names(missing, 3)}. They would keep their initial values. If the "
                f"model does "
                "not "
                "use these modules for this task, name the others by --target-modules; else "
                "please report it with the command."
            )
        self.checked = len(trainable)


def are_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the total norm of `tensors` is finite, with one operation per group of tensors."""
    present = [tensor.detach() for tensor in tensors if tensor is not None]
    return bool(torch.isfinite(whole(torch.nn.utils.get_total_norm(present))))


def _largest(tensors: Iterable[Tensor | None]) -> Tensor:
    """Returns the largest absolute value (a scalar); NaN or infinite if any value is."""
    present = [tensor.detach() for tensor in tensors if tensor is not None]
    return whole(torch.nn.utils.get_total_norm(present, norm_type=math.inf))


def _absolute_sum(gradient: Tensor | None) -> Tensor:
    return torch.zeros(()) if gradient is None else whole(gradient.detach().abs().sum()).float()
