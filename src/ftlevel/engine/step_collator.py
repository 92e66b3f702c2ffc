"""From the rows of an optimizer step to passes through the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftlevel.data.collate import Collator
from ftlevel.data.encode import Encoded
from ftlevel.engine.fast_plan import WORTH_SHARING, FastPlan
from ftlevel.speed.layout import Layout
from ftlevel.speed.passes import cut_packed, cut_padded, cut_shared
from ftlevel.speed.prefixes import lay_out_tree, sort_by_prefix


class StepCollator:
    """Turn the rows of an optimizer step into passes, each a padded batch with its layout.

    What a pass holds depends on the rows alone, so a run that is resumed cuts them as before.

    Args:
        pad_id: as of `Collator`.
        plan: the parts in use.
    """

    def __init__(self, pad_id: int, plan: FastPlan) -> None:
        self._collate = Collator(pad_id)
        self._plan = plan

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, list[dict[str, Any]]]:
        """Return `passes`, what `Collator` returns and a `layout` (None where rows are padded)."""
        lengths = [len(row.input_ids) for row in rows]
        if not self._plan.packs:
            parts = cut_padded(lengths, self._plan.tokens)
            return {"passes": [{**self._batch(rows, part), "layout": None} for part in parts]}
        if self._plan.shares:
            order, shared = sort_by_prefix([row.input_ids for row in rows])
            if sum(shared) >= WORTH_SHARING * sum(lengths):
                parts = cut_shared(lengths, self._plan.tokens, order, shared)
                return {"passes": [self._tree(rows, part) for part in parts]}
        parts = cut_packed(lengths, self._plan.tokens)
        return {"passes": [self._row(rows, part) for part in parts]}

    def _batch(self, rows: Sequence[Encoded], part: Sequence[int]) -> dict[str, Any]:
        return self._collate([rows[i] for i in part])

    def _row(self, rows: Sequence[Encoded], part: Sequence[int]) -> dict[str, Any]:
        batch = self._batch(rows, part)
        return {**batch, "layout": Layout.of_rows(batch["attention_mask"])}

    def _tree(self, rows: Sequence[Encoded], part: Sequence[int]) -> dict[str, Any]:
        layout = lay_out_tree([rows[i].input_ids for i in part])
        return {**self._batch(rows, part), "layout": layout}
