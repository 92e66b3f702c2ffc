"""The fast step on a model: what is put onto it, and its loss on targets.

Every part gives the numbers of the plain step. A model that a part does not know how to serve is
served without it, and the reason is shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ftlevel.data.encode import Encoded
from ftlevel.engine.fast_plan import FastPlan, has_target_head, takes_attention
from ftlevel.engine.packing_check import PackingCheck
from ftlevel.models.module_tree import find_blocks
from ftlevel.speed import attention
from ftlevel.speed.blocks import PackedBlocks
from ftlevel.speed.dropout import OwnDraws
from ftlevel.speed.head import Observe, TargetHead
from ftlevel.speed.lanes import Lanes
from ftlevel.tasks.objectives import Objective, Tokens


class FastStep:
    """The parts of a plan on a model.

    Attributes:
        plan: the parts in use.
        head: the language head on targets only, or None.
        lanes: where passes are computed side by side, or None.

    Args:
        model: a model, with or without an adapter (mutated until `remove`).
        plan: the parts.
    """

    def __init__(self, model: Any, plan: FastPlan) -> None:
        self.plan = plan
        self._model = model
        self._base = base_model(model)
        self._blocks: PackedBlocks | None = None
        if plan.packs:
            if not takes_attention(self._base):
                raise TypeError(f"{type(self._base).__name__} did not take {attention.NAME}")
            self._blocks = PackedBlocks(find_blocks(self._base))
        self.head = TargetHead(self._base) if plan.heads else None
        self.lanes: Lanes | None = None
        self._draws: OwnDraws | None = None
        if plan.lanes > 1:
            self.lanes = Lanes(plan.lanes, torch.get_num_threads(), plan.draws)
            self._draws = OwnDraws(model) if plan.draws else None

    def check(self, rows: Sequence[Encoded], pad_id: int, device: str, dtype: str) -> list[str]:
        """Return what cannot be done after all, and leave it; empty if everything can.

        Args:
            rows: as of `PackingCheck`.
            pad_id: as of `PackingCheck`.
            device: torch device type.
            dtype: compute precision's name.
        """
        if self._blocks is None:
            return []
        check = PackingCheck(self._model, find_blocks(self._base)[-1], rows, pad_id, device, dtype)
        reasons = []
        if leak := check.find_leak():
            self.plan = replace(self.plan, packs=False, shares=False)
            self._pad_again()
            reasons.append(f"rows are padded: {leak}")
        elif self.plan.shares and (reason := check.find_sharing_error()):
            self.plan = replace(self.plan, shares=False)
            reasons.append(f"prefixes are not shared: {reason}")
        if self._draws is not None and (leak or check.draws_outside_of_passes()):
            self._leave_lanes()
            self.plan = replace(self.plan, lanes=1, draws=False)
            reasons.append("passes are computed one at a time: it draws at random, in order")
        return reasons

    def _leave_lanes(self) -> None:
        if self._draws is not None:
            self._draws.remove()
            self._draws = None
        if self.lanes is not None:
            self.lanes.close()
            self.lanes = None

    def _pad_again(self) -> None:
        if self._blocks is not None:
            self._blocks.remove()
            self._blocks = None
            self._base.set_attn_implementation("sdpa")

    def remove(self) -> None:
        """Leave the model as it was."""
        if self.head is not None:
            self.head.remove()
        self._leave_lanes()
        self._pad_again()


def base_model(model: Any) -> Any:
    """Return the transformers model under an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


@contextlib.contextmanager
def target_head(model: Any, objective: Objective | None) -> Iterator[TargetHead | None]:
    """Give the head of `model` inside the block, or None where targets have no language head."""
    base = base_model(model)
    head = TargetHead(base) if has_target_head(base, objective) else None
    try:
        yield head
    finally:
        if head is not None:
            head.remove()


def target_loss(
    head: TargetHead,
    model: Any,
    objective: Objective,
    batch: dict[str, torch.Tensor],
    observe: Observe | None = None,
) -> torch.Tensor:
    """Return the loss of a batch summed over its targets, its head computed on these alone.

    Args:
        head: the head of `model`.
        model: what is called.
        objective: what it is trained on.
        batch: inputs and labels.
        observe: is given scores and targets.
    """
    if not isinstance(objective, Tokens):
        raise TypeError("a language head predicts tokens")
    inputs = dict(batch)
    labels = inputs.pop("labels")
    if objective.feeds_labels:
        base = base_model(model)
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    at, targets = objective.locate(labels)
    return head.loss_sum(lambda: model(**inputs), at, targets, observe)
