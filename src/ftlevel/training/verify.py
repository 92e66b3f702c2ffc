"""Compute steps the plain way and the fast way, and compare: the proof behind `--verify-fast`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import RunError
from ftlevel.evaluation.scoring import batches
from ftlevel.fast.head.loss import compute_shared_prefix, supervised_loss
from ftlevel.fast.layers.norm_glu import FusedGlu, FusedNorm
from ftlevel.fast.packing.layout import PackedLayout, using_layout
from ftlevel.fast.prefixes.shared_prefix import SharedPrefix
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.models.hardware import autocast
from ftlevel.task import Objective

STEPS = 2
LOSS_BOUND = {"float32": 1e-5}
GRADIENT_BOUND = {"float32": 1e-4}
NOISE = 5e-2
"""What half precisions differ by when the same sum is made in another order, over 30 layers."""


@dataclass(frozen=True)
class Verified:
    """How far the fast step is from the plain one, relative to the plain one.

    Attributes:
        steps: how many steps were compared.
        loss: largest difference of a step's loss.
        gradient: largest norm of the difference of a step's gradient over all trained tensors.
    """

    steps: int
    loss: float
    gradient: float


@dataclass(frozen=True)
class StepVerifier:
    """What it takes to compute a step without a Trainer.

    Attributes:
        model: what is trained, with `fast` on it.
        fast: its fast step.
        objective: what it is trained on.
        pad_id: fills a batch.
        batch_size: rows of a micro-batch of the plain step.
        device: torch device type.
        dtype: compute precision's name.
    """

    model: Any
    fast: FastStep
    objective: Objective
    pad_id: int
    batch_size: int
    device: str
    dtype: str

    def __call__(self, rows: Sequence[Encoded], rows_a_step: int) -> Verified:
        """Compare the first steps over `rows`, without dropout; no gradient is left behind.

        Raises:
            RunError: they differ by more than the precision explains.
        """
        training = self.model.training
        self.model.eval()
        losses, gradients, steps = 0.0, 0.0, 0
        for step in batches(rows[: STEPS * rows_a_step], rows_a_step):
            plain = self._step(self._plain(step))
            self._fuse(True)
            fast = self._fast(step)
            self._fuse(False)
            losses = max(losses, abs(plain[0] - fast[0]) / max(abs(plain[0]), 1e-12))
            gradients = max(gradients, _differ(fast[1], plain[1]))
            steps += 1
        self.model.train(training)
        verified = Verified(steps, losses, gradients)
        loss_bound = LOSS_BOUND.get(self.dtype, NOISE)
        gradient_bound = GRADIENT_BOUND.get(self.dtype, NOISE)
        if not (losses <= loss_bound and gradients <= gradient_bound):
            raise RunError(
                f"--verify-fast: the fast step is not the plain one: losses differ by {losses:.2g} "
                f"(bound {loss_bound:g}), gradients by {gradients:.2g} (bound {gradient_bound:g}). "
                "Train with --no-fast, and please report it with the command."
            )
        return verified

    def _fuse(self, on: bool) -> None:
        """Let fused modules compute as they do in training; dropout stays off."""
        from ftlevel.fast.layers.fused_lora.forward import (
            FusedForward,  # PEFT's layers import bitsandbytes
        )

        for module in self.model.modules():
            fused = isinstance(module, FusedForward | FusedNorm | FusedGlu)
            if fused and isinstance(module, torch.nn.Module):
                module.training = on

    def _plain(self, rows: Sequence[Encoded]) -> Iterator[torch.Tensor]:
        """Yield the summed loss of each micro-batch."""
        for part in batches(rows, self.batch_size):
            batch = self._on_device(Collator(self.pad_id)(part))
            inputs, labels = self.objective.split(batch)
            logits = self.objective.logits(self.model(**inputs))
            yield self.objective.loss_sum(logits, labels, batch["attention_mask"])

    def _fast(self, rows: Sequence[Encoded]) -> tuple[float, list[torch.Tensor]]:
        """Return loss and gradient of a step, its micro-batches computed as in training."""
        batch = StepCollator(self.pad_id, self.fast.plan)(rows)
        micro_batches = [
            (part.pop("layout"), self._on_device(part)) for part in batch["micro_batches"]
        ]
        workers = self.fast.workers
        if workers is None or not batch["in_parallel"]:
            return self._step(self._one_by_one(micro_batches))
        self.model.zero_grad()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        losses = workers.backward(
            self._micro_batch_loss,
            micro_batches,
            trained,
            shared_prefix=self._shared_prefix(batch.get("shared_prefix")),
        )
        return sum(loss.item() for loss in losses), self._take_gradients()

    def _shared_prefix(self, beginning: dict[str, Any] | None) -> SharedPrefix | None:
        """Return what all rows of a step begin with, computed, if anything."""
        if beginning is None or self.fast.cross_entropy is None:
            return None
        layout = beginning.pop("layout")
        with autocast(self.device, self.dtype):
            return compute_shared_prefix(self.fast.cross_entropy, self.model, layout, beginning)

    def _one_by_one(
        self, micro_batches: Sequence[tuple[PackedLayout | None, dict[str, torch.Tensor]]]
    ) -> Iterator[torch.Tensor]:
        """Yield the summed loss of each micro-batch."""
        for layout, batch in micro_batches:
            with using_layout(layout.to(self.device) if layout else None):
                yield self._micro_batch_loss(batch)

    def _micro_batch_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the summed loss of a micro-batch on the current layout."""
        head, objective = self.fast.cross_entropy, self.objective
        with autocast(self.device, self.dtype):
            if head is not None:
                return supervised_loss(head, self.model, objective, batch)
            inputs, labels = objective.split(batch)
            logits = objective.logits(self.model(**inputs))
            return objective.loss_sum(logits, labels, batch["attention_mask"])

    def _step(self, losses: Iterator[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        """Return the summed loss of a step and its gradient, tensor by tensor."""
        self.model.zero_grad()
        total, made = 0.0, iter(losses)
        while True:
            with autocast(self.device, self.dtype):
                loss = next(made, None)
            if loss is None:
                break
            # The generator still holds the layout, which checkpoints need.
            torch.autograd.backward(loss)
            total += loss.item()
        return total, self._take_gradients()

    def _take_gradients(self) -> list[torch.Tensor]:
        """Return the gradients that are there, and leave none."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [p.grad.detach().clone() for p in trained if p.grad is not None]
        self.model.zero_grad()
        return gradients

    def _on_device(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device) for name, value in batch.items()}


def _differ(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Return the norm of the difference of two gradients, relative to the second's."""
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(some, others, strict=True))
    whole = sum(float(b.double().square().sum()) for b in others)
    return float((apart / whole) ** 0.5) if whole else float(apart > 0)
