"""From the rows of an optimizer step to passes through the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.fast.packing.layout import Layout
from ftlevel.fast.packing.micro_batches import (
    Passes,
    cost_shared,
    cut_packed,
    cut_padded,
    cut_shared,
)
from ftlevel.fast.parallel_workers import duration
from ftlevel.fast.plan.fast_plan import WORTH_SHARING, FastPlan
from ftlevel.fast.prefixes.tree import LEAST, lay_out_tree, sort_by_prefix

A_PASS = 250
"""What a trunk's pass costs beside its tokens, in tokens. With 342 tokens and 1,776 after it a step
of SmolLM2 is 5 % longer than without; with 1,450 and 2,100 a fifth shorter."""


class StepCollator:
    """Turn the rows of an optimizer step into passes, each a padded batch with its layout.

    What a pass holds depends on the rows and the plan alone, so a run that is resumed cuts them as
    before.

    Args:
        pad_id: as of `Collator`.
        plan: the parts in use.
    """

    def __init__(self, pad_id: int, plan: FastPlan) -> None:
        self._collate = Collator(pad_id)
        self._plan = plan

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Return `passes`, whether they are computed `side_by_side`, and their `trunk` if any.

        A pass is what `Collator` returns and its `layout` (None where rows are padded). A trunk is
        the batch of what all rows begin with, and its layout: the passes go on from it.
        """
        plan = self._plan
        cut = _Cut(rows, plan)
        ways = [_Way(cut, plan.tokens, 1)]
        if plan.lanes > 1:
            ways.append(_Way(cut, plan.tokens // plan.lanes, plan.lanes))
            if plan.trunk and (trunk := cut.find_trunk(rows)):
                # Its activations are held, too; half of the budget is for rows at least.
                budget = max(plan.tokens - trunk, plan.tokens // 2) // plan.lanes
                ways.append(_Way(cut.beyond(trunk), budget, plan.lanes))
        way = min(ways, key=lambda way: way.duration)  # the first of equals
        trunk = way.cut.trunk
        step: dict[str, Any] = {
            "passes": [self._pass(rows, part, way.cut) for part in way.passes],
            "side_by_side": way.lanes > 1,
        }
        return {**step, "trunk": self._trunk(rows[0].input_ids[:trunk])} if trunk else step

    def _trunk(self, tokens: list[int]) -> dict[str, Any]:
        ids = torch.tensor([tokens])
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        layout = Layout.of_rows(batch["attention_mask"])
        if self._plan.reads is not None:  # nothing is, and one token is the least that there is
            layout = layout.reading(torch.tensor([len(tokens) - 1]))
        return {**batch, "layout": layout}

    def _pass(self, rows: Sequence[Encoded], part: Sequence[int], cut: _Cut) -> dict[str, Any]:
        batch: dict[str, Any] = self._collate([rows[i] for i in part])
        if not self._plan.packs:
            layout = None
        elif cut.is_tree:
            layout = lay_out_tree([rows[i].input_ids for i in part], before=cut.trunk)
        else:
            layout = Layout.of_rows(batch["attention_mask"])
        if layout is not None and self._plan.reads is not None:
            layout = layout.reading(self._plan.reads(batch))
        return {**batch, "layout": layout}


class _Cut:
    """How the rows of one step are cut: padded, packed, or as trees where that is worth it.

    Attributes:
        is_tree: whether a pass computes shared prefixes once.
        trunk: how many tokens of every row are left to a pass before these.
    """

    def __init__(self, rows: Sequence[Encoded], plan: FastPlan) -> None:
        self._lengths = [len(row.input_ids) for row in rows]
        self._packs = plan.packs
        self.is_tree = False
        self.trunk = 0
        if plan.packs and plan.shares:
            self._order, self._shared = sort_by_prefix([row.input_ids for row in rows])
            self.is_tree = sum(self._shared) >= WORTH_SHARING * sum(self._lengths)

    def __call__(self, budget: int, multiple: int) -> Passes:
        """Return the rows of each pass of at most `budget` tokens."""
        if self.is_tree:
            return cut_shared(self._lengths, budget, self._order, self._shared, multiple)
        cut = cut_packed if self._packs else cut_padded
        return cut(self._lengths, budget, multiple)

    def find_trunk(self, rows: Sequence[Encoded]) -> int:
        """Return how many tokens all `rows` begin with, of which none predicts a target."""
        if not self.is_tree or len(rows) < 2:
            return 0
        common = min(self._shared[row] for row in self._order[1:])
        common = min(common, *(_first_read(row) for row in rows))
        return common if common >= LEAST else 0

    def beyond(self, trunk: int) -> _Cut:
        """Return how the rows are cut where a pass of its own computes their first tokens."""
        cut = copy.copy(self)
        cut.trunk = trunk
        cut._lengths = [length - trunk for length in self._lengths]
        cut._shared = [s - trunk if s - trunk >= LEAST else 0 for s in self._shared]
        return cut

    def cost(self, part: Sequence[int]) -> int:
        """Return how many places of the row a pass computes."""
        if self.is_tree:
            return cost_shared(part, self._lengths, self._order, self._shared)
        own = [self._lengths[row] for row in part]
        return sum(own) if self._packs else max(own) * len(own)


class _Way:
    """One way to compute a step.

    Attributes:
        cut: how its rows are cut.
        passes: the rows of each pass.
        lanes: how many are side by side.
        duration: how long it takes, as `speed.lanes.duration` counts it.
    """

    def __init__(self, cut: _Cut, budget: int, lanes: int) -> None:
        self.cut = cut
        self.passes = cut(max(1, budget), lanes)
        self.lanes = lanes if len(self.passes) > 1 else 1
        self.duration = duration([cut.cost(part) for part in self.passes], self.lanes)
        if cut.trunk:
            self.duration += cut.trunk + A_PASS


def _first_read(row: Encoded) -> int:
    """Return which token of a causal model's row is the first to predict a target, or the last."""
    labels = row.labels
    if not isinstance(labels, list):
        return 0
    places = range(1, len(labels))
    return next((at - 1 for at in places if labels[at] != IGNORED), len(labels) - 1)
