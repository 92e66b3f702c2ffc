"""From the rows of an optimizer step to passes through the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftlevel.data.collate import Collator
from ftlevel.data.encode import Encoded
from ftlevel.engine.fast_plan import WORTH_SHARING, FastPlan
from ftlevel.speed.lanes import pays_off
from ftlevel.speed.layout import Layout
from ftlevel.speed.passes import Passes, cost_shared, cut_packed, cut_padded, cut_shared
from ftlevel.speed.prefixes import lay_out_tree, sort_by_prefix


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
        """Return `passes`, and whether they are computed `side_by_side`.

        A pass is what `Collator` returns and its `layout` (None where rows are padded).
        """
        plan = self._plan
        cut = _Cut(rows, plan)
        alone = cut(plan.tokens, 1)
        beside = cut(max(1, plan.tokens // plan.lanes), plan.lanes) if plan.lanes > 1 else alone
        costs, costs_alone = [[cut.cost(part) for part in c] for c in (beside, alone)]
        side_by_side = len(beside) > 1 and pays_off(costs, costs_alone, plan.lanes)
        passes = [self._pass(rows, part, cut) for part in (beside if side_by_side else alone)]
        return {"passes": passes, "side_by_side": side_by_side and plan.lanes > 1}

    def _pass(self, rows: Sequence[Encoded], part: Sequence[int], cut: _Cut) -> dict[str, Any]:
        batch: dict[str, Any] = self._collate([rows[i] for i in part])
        if not self._plan.packs:
            layout = None
        elif cut.is_tree:
            layout = lay_out_tree([rows[i].input_ids for i in part])
        else:
            layout = Layout.of_rows(batch["attention_mask"])
        if layout is not None and self._plan.reads is not None:
            layout = layout.reading(self._plan.reads(batch))
        return {**batch, "layout": layout}


class _Cut:
    """How the rows of one step are cut: padded, packed, or as trees where that is worth it."""

    def __init__(self, rows: Sequence[Encoded], plan: FastPlan) -> None:
        self._lengths = [len(row.input_ids) for row in rows]
        self._packs = plan.packs
        self.is_tree = False
        if plan.packs and plan.shares:
            self._order, self._shared = sort_by_prefix([row.input_ids for row in rows])
            self.is_tree = sum(self._shared) >= WORTH_SHARING * sum(self._lengths)

    def __call__(self, budget: int, multiple: int) -> Passes:
        """Return the rows of each pass of at most `budget` tokens."""
        if self.is_tree:
            return cut_shared(self._lengths, budget, self._order, self._shared, multiple)
        cut = cut_packed if self._packs else cut_padded
        return cut(self._lengths, budget, multiple)

    def cost(self, part: Sequence[int]) -> int:
        """Return how many places of the row a pass computes."""
        if self.is_tree:
            return cost_shared(part, self._lengths, self._order, self._shared)
        own = [self._lengths[row] for row in part]
        return sum(own) if self._packs else max(own) * len(own)
