"""Cut the rows of an optimizer step into passes through the model of a bounded size.

The gradient of a step is the sum over its passes, however they are cut; what is cut well costs less
and holds less. Passes are as even as they can be, and a multiple of those that run side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

AddedCost = Callable[[Sequence[int], int], int]
"""The rows of a pass and a row → what the pass costs more with it, in tokens."""

Passes = list[list[int]]
"""The rows of each pass."""


def cut_padded(lengths: Sequence[int], budget: int, multiple: int = 1) -> Passes:
    """Return passes that cost their rows times the longest, longest first.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a pass; a longer row has a pass of its own.
        multiple: of how many passes there are, if there are rows enough.
    """
    order = _by_length(lengths, range(len(lengths)))
    return _cut(order, budget, lambda rows, row: lengths[rows[0] if rows else row], multiple)


def cut_packed(lengths: Sequence[int], budget: int, multiple: int = 1) -> Passes:
    """Return passes that cost the tokens of their rows, the most expensive first.

    Each row, longest first, goes to the pass that is the shortest so far (Graham, 1969).

    Args:
        lengths: tokens of each row.
        budget: as of `cut_padded`.
        multiple: as of `cut_padded`.
    """
    order = _by_length(lengths, range(len(lengths)))
    count = _round_up(math.ceil(sum(lengths) / budget), multiple, len(lengths))
    while True:
        passes = _spread(order, lengths, count)
        fits = all(len(p) == 1 or sum(lengths[row] for row in p) <= budget for p in passes)
        if fits or count == len(lengths):
            return sorted(passes, key=lambda rows: -sum(lengths[row] for row in rows))
        count = _round_up(count + 1, multiple, len(lengths))


def cut_shared(
    lengths: Sequence[int],
    budget: int,
    order: Sequence[int],
    shared: Sequence[int],
    multiple: int = 1,
) -> Passes:
    """Return passes that cost shared tokens once, their rows in the order of `order`.

    Neighbours share the most. Where all rows share one short prefix and little else, passes of rows
    from everywhere are more even: what costs less in the most expensive pass is taken.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a pass.
        order: the rows by their prefixes.
        shared: for each row what it shares with the one before it in `order`.
        multiple: as of `cut_padded`.
    """
    neighbours = _cut(
        order, budget, lambda rows, row: lengths[row] - (shared[row] if rows else 0), multiple
    )
    begin = min((shared[row] for row in order[1:]), default=0)  # in every pass, however it is cut
    own = [length - max(common, begin) for length, common in zip(lengths, shared, strict=True)]
    rank = {row: at for at, row in enumerate(order)}
    spread = [
        sorted(rows, key=rank.__getitem__)
        for rows in _spread(_by_length(own, range(len(own))), own, len(neighbours))
    ]

    def worst(cut: Passes) -> int:
        return max(cost_shared(rows, lengths, order, shared) for rows in cut)

    return spread if worst(spread) < worst(neighbours) else neighbours


def cost_shared(
    rows: Sequence[int], lengths: Sequence[int], order: Sequence[int], shared: Sequence[int]
) -> int:
    """Return how many tokens a pass of `rows` computes, given in the order of `order`."""
    rank = {row: at for at, row in enumerate(order)}
    cost, before = 0, -1
    for row in rows:
        at = rank[row]
        between = order[before + 1 : at + 1]
        cost += lengths[row] - (min(shared[other] for other in between) if before >= 0 else 0)
        before = at
    return cost


def _by_length(lengths: Sequence[int], rows: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: -lengths[row])  # stable: ties keep order


def _round_up(count: int, multiple: int, most: int) -> int:
    return min(most, math.ceil(count / multiple) * multiple)


def _spread(order: Sequence[int], costs: Sequence[int], count: int) -> Passes:
    """Return `count` passes, each row in the one that costs the least so far."""
    passes: Passes = [[] for _ in range(count)]
    totals = [0] * count
    for row in order:
        least = totals.index(min(totals))
        passes[least].append(row)
        totals[least] += costs[row]
    return [rows for rows in passes if rows]


def _cut(order: Sequence[int], budget: int, added: AddedCost, multiple: int) -> Passes:
    """Return as few passes as the budget and the multiple allow, as even as that many can be."""
    most = _round_up(len(_fill(order, budget, added)), multiple, len(order))
    low, high = 1, budget
    while low < high:  # the smallest budget that needs no more passes
        middle = (low + high) // 2
        if len(_fill(order, middle, added)) > most:
            low = middle + 1
        else:
            high = middle
    return _fill(order, low, added)


def _fill(order: Sequence[int], budget: int, added: AddedCost) -> Passes:
    """Return the rows of each pass, filled in the given order."""
    passes: Passes = []
    cost = 0
    for row in order:
        more = added(passes[-1], row) if passes else 0
        if not passes or cost + more > budget:
            passes.append([])
            cost, more = 0, added([], row)
        passes[-1].append(row)
        cost += more
    return passes
