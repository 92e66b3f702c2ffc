"""The fast step on a model: what is put onto it, once the model has been asked whether it may be.

Every part gives the numbers of the plain step. A model that a part does not know how to serve is
served without it, and the reason is shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ftlevel.data.encoding.encode import Encoded
from ftlevel.fast.attention import packed as attention
from ftlevel.fast.checks.head import find_head_error
from ftlevel.fast.checks.packing import PackingCheck
from ftlevel.fast.checks.pruning import ReadCheck
from ftlevel.fast.head.cross_entropy import TargetHead
from ftlevel.fast.head.loss import base_model
from ftlevel.fast.head.pruning import UnreadTokens
from ftlevel.fast.layers.dropout import OwnDraws
from ftlevel.fast.layers.norm_glu import FusedElementwise
from ftlevel.fast.packing.blocks import PackedBlocks
from ftlevel.fast.parallel_workers import Lanes
from ftlevel.fast.plan.fast_plan import FastPlan, has_target_head, takes_attention
from ftlevel.models.module_tree import find_blocks
from ftlevel.task import Objective, TokenObjective


class FastStep:
    """The parts of a plan on a model.

    Attributes:
        plan: the parts in use.
        head: the language head on targets only, or None.
        lanes: where passes are computed side by side, or None.
        elementwise: norms and gates in one node each, or None.
        skipping: how many linears of the last block compute only what is read after it.

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
        self.elementwise = FusedElementwise(model) if plan.elementwise else None
        self.lanes: Lanes | None = None
        self.skipping = 0
        self._unread: UnreadTokens | None = None
        self._draws = OwnDraws(model)
        if plan.lanes > 1:
            self.lanes = Lanes(plan.lanes, torch.get_num_threads(), plan.draws)

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
            self.plan = replace(self.plan, packs=False, shares=False, trunk=False)
            self._pad_again()
            reasons.append(f"rows are padded: {leak}")
        elif self.plan.shares and (reason := check.find_sharing_error()):
            self.plan = replace(self.plan, shares=False, trunk=False)
            reasons.append(f"prefixes are not shared: {reason}")
        elif self.plan.trunk and (reason := check.find_trunk_error()):
            self.plan = replace(self.plan, trunk=False)
            reasons.append(f"passes do not share their prefix: {reason}")
        draws = self.lanes is not None and self.lanes.draws
        if draws and (leak or check.draws_outside_of_passes()):
            self._leave_lanes()
            self.plan = replace(self.plan, lanes=1, draws=False)
            reasons.append("passes are computed one at a time: it draws at random, in order")
        return reasons

    def _leave_lanes(self) -> None:
        if self.lanes is not None:
            self.lanes.close()
            self.lanes = None

    def check_head(
        self, objective: Objective, rows: Sequence[Encoded], pad_id: int, device: str, dtype: str
    ) -> str:
        """Return why the head is not computed on targets only, and leave it; empty if it can be.

        Args:
            objective: what the model is trained on.
            rows: as of `find_head_error`.
            pad_id: as of `find_head_error`.
            device: torch device type.
            dtype: compute precision's name.
        """
        if self.head is None or not isinstance(objective, TokenObjective):
            return ""
        reason = find_head_error(self.head, self._model, objective, rows, pad_id, device, dtype)
        if not reason:
            return ""
        self.plan = replace(self.plan, heads=False, trunk=False)
        self.head.remove()
        self.head = None
        return f"its head is computed on every token: {reason}"

    def find_unread(
        self, objective: Objective, rows: Sequence[Encoded], pad_id: int, device: str, dtype: str
    ) -> None:
        """Have the last block compute only what is read after it, where that is found to be less.

        Args:
            objective: what the model is trained on.
            rows: as of `PackingCheck`.
            pad_id: as of `PackingCheck`.
            device: torch device type.
            dtype: compute precision's name.
        """
        if self._blocks is None or not self.plan.skips:
            return
        last = find_blocks(self._base)[-1]
        reads, linears = ReadCheck(self._model, last, rows, pad_id, device, dtype)(objective)
        if linears:
            self.plan = replace(self.plan, reads=reads)
            self._unread, self.skipping = UnreadTokens(linears), len(linears)

    def _pad_again(self) -> None:
        if self._blocks is not None:
            self._blocks.remove()
            self._blocks = None
            self._base.set_attn_implementation("sdpa")

    def remove(self) -> None:
        """Leave the model as it was."""
        if self.head is not None:
            self.head.remove()
        if self.elementwise is not None:
            self.elementwise.remove()
        if self._unread is not None:
            self._unread.remove()
        self._draws.remove()
        self._leave_lanes()
        self._pad_again()


@contextlib.contextmanager
def target_head(
    model: Any,
    objective: Objective | None,
    rows: Sequence[Encoded],
    pad_id: int,
    device: str,
    dtype: str,
) -> Iterator[TargetHead | None]:
    """Give the head of `model` inside the block.

    None where targets have no language head, or where it is not what the model gives by itself:
    the arguments are those of `find_head_error`.
    """
    base = base_model(model)
    head = TargetHead(base) if has_target_head(base, objective) else None
    try:
        if (
            head is not None
            and isinstance(objective, TokenObjective)
            and find_head_error(head, model, objective, rows, pad_id, device, dtype)
        ):
            head.remove()
            head = None
        yield head
    finally:
        if head is not None:
            head.remove()
