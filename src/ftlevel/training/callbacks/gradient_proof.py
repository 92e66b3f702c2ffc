"""Stop a run in which something does not learn, or is not finite any more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.errors import RunError, listing
from ftlevel.events import Listener
from ftlevel.training.callbacks.recovery import Recovery

_STOPPED = "Training stopped before the weights took it."


class GradientProof(TrainerCallback):
    """Stop when a tensor that should learn gets no gradient, or something is not finite any more.

    Looked at in every step: its loss, the gradients, and the weights that the optimizer left.

    LoRA's A has an exactly zero gradient at first because B is zero; what is still zero after a
    step at a learning rate above zero (warm-up begins at zero) is reported as not learning.

    Attributes:
        checked: how many tensors had a gradient at the first step.
        idle: tensors whose gradient was zero at first and after the first real step.
    """

    def __init__(
        self, listener: Listener, step_loss: Callable[[], torch.Tensor], recovery: Recovery
    ) -> None:
        """Remember whom to tell, how the loss of the step so far is asked for, and who decides."""
        self.listener = listener
        self.recovery = recovery
        self.step_loss = step_loss
        self.checked = 0
        self.idle: list[str] = []
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
        """Look at every gradient of the optimizer step that is about to be made."""
        if not self.checked:  # the first step of this process: a resumed run proves itself too
            self._trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            self._check_all_have_one(self._trainable)
        trainable, step = self._trainable, state.global_step + 1
        loss = float(self.step_loss())
        is_wrong = not math.isfinite(loss)
        if is_wrong or (not self.recovery.stops and self.recovery.agree(is_wrong)):
            self.recovery.decide(
                step,
                f"the loss is {loss} at step {step}",
                f"{_STOPPED} Lower --learning-rate, or use --dtype float32.",
            )
            return
        if self._is_checked and _are_finite(p.grad for _, p in trainable):
            self.recovery.look_for_spike(step, loss)
            return
        sums = torch.stack([_absolute_sum(p.grad) for _, p in trainable])
        if not bool(torch.isfinite(sums).all()):
            bad = [n for (n, _), s in zip(trainable, sums, strict=True) if not torch.isfinite(s)]
            self.recovery.decide(
                step,
                f"the gradient is not finite at step {step} ({len(bad):,} of {len(trainable):,} "
                f"tensors, such as {bad[0]})",
                f"{_STOPPED} Lower --learning-rate, or use --dtype float32.",
            )
            return
        self.recovery.look_for_spike(step, loss)
        if not self._is_checked:
            zero = {n for (n, _), s in zip(trainable, sums, strict=True) if s == 0}
            self._look_for_idle(zero, len(trainable), optimizer)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Look at every weight that the optimizer has just changed."""
        if _are_finite(p for _, p in self._trainable):
            return
        bad = [name for name, p in self._trainable if not bool(torch.isfinite(p).all())]
        if bad:  # a norm may overflow by itself
            step = state.global_step + 1
            self.recovery.decide(
                step,
                f"{len(bad):,} of {len(self._trainable):,} trained tensors are not finite after "
                f"step {step}, such as {bad[0]}",
                "They are not saved. Lower --learning-rate, or use another --optim.",
                in_weights=True,
            )

    def _look_for_idle(self, zero: set[str], count: int, optimizer: Any) -> None:
        """Compare the tensors with a zero gradient before and after the first real step."""
        if self._zero_first is None:
            self._zero_first = zero
        elif self._has_moved:
            self._is_checked = True
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


def _are_finite(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether the norm of all is, which one operation a group of tensors tells."""
    there = [tensor.detach() for tensor in tensors if tensor is not None]
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(there)))


def _absolute_sum(gradient: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(()) if gradient is None else gradient.detach().abs().sum().float()
