"""Collate the rows of an optimizer step into micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.fast.packing import (
    MicroBatches,
    PackedLayout,
    count_computed_tokens,
    split_packed,
    split_padded,
    split_shared,
)
from ftlevel.fast.parallel_workers import duration
from ftlevel.fast.plan import MIN_SHARED_FRACTION, FastPlan
from ftlevel.fast.prefixes import (
    MIN_PREFIX,
    common_prefix_length,
    create_prefix_tree,
    sort_by_prefix,
)
from ftlevel.objectives import Objective

PREFIX_COST = 120
"""Cost of a shared prefix's own micro-batch beyond the tokens. With 302 tokens and 1,536 after it,
a step of SmolLM2 takes a tenth less than without in float32, and as long in bfloat16 (Zen 4).
"""


class StepCollator:
    """Collates the rows of an optimizer step into micro-batches with layouts.

    The split depends only on rows and plan, so a resumed run repeats it. With an `objective`, the
    targets are located here and not in the loss.
    """

    def __init__(self, pad_id: int, plan: FastPlan, objective: Objective | None = None) -> None:
        self._collate = Collator(pad_id)
        self._plan = plan
        # Located here: on a GPU the loss would have to wait for their number.
        self._objective = objective if plan.chunked_cross_entropy else None

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Returns a dict of `rows`, `micro_batches`, `parts`, `in_parallel` and `has_parts`.

        `parts` are the row indices of each micro-batch; `has_parts` is whether some micro-batch has
        several rows. `shared_prefix`, if any, has batch and layout of the rows' common prefix;
        A micro-batch is the output of `Collator` with its `layout` (None if padded) and, for a
        language head, its `located` targets.
        """
        schedule = self._select_schedule(rows)
        partition = schedule.partition
        step: dict[str, Any] = {
            "rows": rows,
            "micro_batches": [
                self._micro_batch(rows, part, partition) for part in schedule.micro_batches
            ],
            "in_parallel": schedule.workers > 1,
            "has_parts": any(len(part) > 1 for part in schedule.micro_batches),
            "parts": [list(part) for part in schedule.micro_batches],
        }
        if partition.prefix:
            step["shared_prefix"] = self._shared_prefix(rows[0].input_ids[: partition.prefix])
        return step

    def split(self, rows: Sequence[Encoded]) -> list[tuple[list[int], dict[str, Any]]]:
        """Returns (row indices, micro-batch) pairs for micro-batches computed one at a time."""
        partition = _Partition(rows, self._plan)
        return [
            (list(part), self._micro_batch(rows, part, partition))
            for part in partition(self._plan.tokens, 1)
        ]

    def halve_tokens(self) -> int:
        """Halve the maximum number of tokens of later micro-batches; returns the new maximum."""
        self._plan = replace(self._plan, tokens=max(1, self._plan.tokens // 2))
        return self._plan.tokens

    def disable_shared_prefix(self) -> None:
        """Disable the shared prefix of later steps."""
        self._plan = replace(self._plan, shared_prefix=False)

    def _select_schedule(self, rows: Sequence[Encoded]) -> _Schedule:
        plan, partition = self._plan, _Partition(rows, self._plan)
        candidates = [_Schedule(partition, plan.tokens, 1)]
        if plan.workers > 1:
            candidates.append(_Schedule(partition, plan.tokens // plan.workers, plan.workers))
            if plan.shared_prefix and (prefix := partition.get_shared_prefix_length(rows)):
                # Its activations need memory, too; rows get at least half of the budget.
                budget = max(plan.tokens - prefix, plan.tokens // 2) // plan.workers
                candidates.append(_Schedule(partition.without_prefix(prefix), budget, plan.workers))
        return min(candidates, key=lambda schedule: schedule.duration)

    def _shared_prefix(self, tokens: list[int]) -> dict[str, Any]:
        ids = torch.tensor([tokens])
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        layout = PackedLayout.from_mask(batch["attention_mask"])
        if self._plan.needed_tokens is not None:  # none is needed, and one is the minimum
            layout = layout.with_needed_tokens(torch.tensor([len(tokens) - 1]))
        return {**batch, "layout": layout}

    def _micro_batch(
        self, rows: Sequence[Encoded], indices: Sequence[int], partition: _Partition
    ) -> dict[str, Any]:
        batch: dict[str, Any] = self._collate([rows[i] for i in indices])
        if not self._plan.packs:
            layout = None
        elif partition.is_tree:
            sequences = [sequence.input_ids for i in indices for sequence in rows[i].sequences]
            layout = create_prefix_tree(sequences, before=partition.prefix)
        else:
            layout = PackedLayout.from_mask(batch["attention_mask"])
        if layout is not None:
            layout = layout.pad_to(self._plan.token_multiple)
        if layout is not None and self._plan.needed_tokens is not None:
            layout = layout.with_needed_tokens(self._plan.needed_tokens(batch))
        if self._objective is not None:
            batch["located"] = self._objective.locate(batch["labels"])
        return {**batch, "layout": layout}


class _Partition:
    """How the rows of a step are split into micro-batches: padded, packed, or as prefix trees.

    `is_tree` means that micro-batches compute shared prefixes once. `prefix` is the number of first
    tokens, common to all rows, that are computed before all micro-batches.
    """

    def __init__(self, rows: Sequence[Encoded], plan: FastPlan) -> None:
        self._lengths = [_num_tokens(row, packs=plan.packs) for row in rows]
        self._packs = plan.packs
        self.is_tree = False
        self.prefix = 0
        if plan.packs and plan.prefix_tree:
            within = [_num_shared_tokens(row) for row in rows]
            self._order, self._shared = sort_by_prefix([row.input_ids for row in rows])
            num_saved = sum(self._shared) + sum(within)
            self.is_tree = num_saved >= MIN_SHARED_FRACTION * sum(self._lengths)
            if self.is_tree:
                self._lengths = [
                    n - saved_tokens for n, saved_tokens in zip(self._lengths, within, strict=True)
                ]

    def __call__(self, budget: int, multiple: int) -> MicroBatches:
        if self.is_tree:
            return split_shared(self._lengths, budget, self._order, self._shared, multiple)
        split = split_packed if self._packs else split_padded
        return split(self._lengths, budget, multiple)

    def get_shared_prefix_length(self, rows: Sequence[Encoded]) -> int:
        """Returns how many tokens `rows` share before any predicts a target; 0 if too few."""
        if not self.is_tree or len(rows) < 2:
            return 0
        length = min(self._shared[row] for row in self._order[1:])
        length = min(length, *(_first_target(row) for row in rows))
        return length if length >= MIN_PREFIX else 0

    def without_prefix(self, prefix: int) -> _Partition:
        """Returns a partition without the first `prefix` tokens, which are computed separately."""
        partition = copy.copy(self)
        partition.prefix = prefix
        partition._lengths = [length - prefix for length in self._lengths]
        partition._shared = [s - prefix if s - prefix >= MIN_PREFIX else 0 for s in self._shared]
        return partition

    def get_num_tokens(self, indices: Sequence[int]) -> int:
        if self.is_tree:
            return count_computed_tokens(indices, self._lengths, self._order, self._shared)
        lengths = [self._lengths[row] for row in indices]
        return sum(lengths) if self._packs else max(lengths) * len(lengths)


class _Schedule:
    """Micro-batches and workers of a step; `duration` is the time as estimated by `duration()`."""

    def __init__(self, partition: _Partition, budget: int, workers: int) -> None:
        self.partition = partition
        self.micro_batches = partition(max(1, budget), workers)
        self.workers = workers if len(self.micro_batches) > 1 else 1
        num_tokens = [partition.get_num_tokens(part) for part in self.micro_batches]
        self.duration = duration(num_tokens, self.workers)
        if partition.prefix:
            self.duration += partition.prefix + PREFIX_COST


def _num_tokens(row: Encoded, *, packs: bool) -> int:
    lengths = [len(sequence.input_ids) for sequence in row.sequences]
    return sum(lengths) if packs else max(lengths) * len(lengths)


def _num_shared_tokens(row: Encoded) -> int:
    """Returns how many tokens of sequences in `row` are a prefix shared with the previous one."""
    sequences = row.sequences
    lengths = [common_prefix_length(a.input_ids, b.input_ids) for a, b in pairwise(sequences)]
    return sum(shared for shared in lengths if shared >= MIN_PREFIX)


def _first_target(row: Encoded) -> int:
    """Returns the index of the first token that predicts a target, or of the last token."""
    labels = row.labels
    if not isinstance(labels, list):
        return 0
    positions = range(1, len(labels))
    return next((at - 1 for at in positions if labels[at] != IGNORED), len(labels) - 1)
