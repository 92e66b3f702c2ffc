"""Split the rows of an optimizer step into micro-batches of a bounded size.

The gradient of a step is the sum over its micro-batches, however they are split; what is split well
costs less and holds less. They are as even as they can be, and a multiple of the parallel workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

AddedCost = Callable[[Sequence[int], int], int]
"""The rows of a micro-batch and a row → what the micro-batch costs more with it, in tokens."""

MicroBatches = list[list[int]]
"""The rows of each micro-batch."""


def split_padded(lengths: Sequence[int], budget: int, multiple: int = 1) -> MicroBatches:
    """Return micro-batches that cost their rows times the longest, longest first.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a micro-batch; a longer row has a micro-batch of its own.
        multiple: of how many micro-batches there are, if there are rows enough.
    """
    order = _by_length(lengths, range(len(lengths)))
    return _split(order, budget, lambda rows, row: lengths[rows[0] if rows else row], multiple)


def split_packed(lengths: Sequence[int], budget: int, multiple: int = 1) -> MicroBatches:
    """Return micro-batches that cost the tokens of their rows, the most expensive first.

    Each row, longest first, goes to the micro-batch that is the shortest so far (Graham, 1969).

    Args:
        lengths: tokens of each row.
        budget: as of `split_padded`.
        multiple: as of `split_padded`.
    """
    order = _by_length(lengths, range(len(lengths)))
    count = _round_up(math.ceil(sum(lengths) / budget), multiple, len(lengths))
    while True:
        micro_batches = _spread(order, lengths, count)
        fits = all(len(p) == 1 or sum(lengths[row] for row in p) <= budget for p in micro_batches)
        if fits or count == len(lengths):
            return sorted(micro_batches, key=lambda rows: -sum(lengths[row] for row in rows))
        count = _round_up(count + 1, multiple, len(lengths))


def split_shared(
    lengths: Sequence[int],
    budget: int,
    order: Sequence[int],
    shared: Sequence[int],
    multiple: int = 1,
) -> MicroBatches:
    """Return micro-batches that cost shared tokens once, their rows in the order of `order`.

    Neighbours share the most. Where all rows share one short prefix and little else, micro-batches
    of rows from everywhere are more even: what costs less in the most expensive one is taken.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a micro-batch.
        order: the rows by their prefixes.
        shared: for each row what it shares with the one before it in `order`.
        multiple: as of `split_padded`.
    """
    neighbours = _split(
        order, budget, lambda rows, row: lengths[row] - (shared[row] if rows else 0), multiple
    )
    begin = min((shared[row] for row in order[1:]), default=0)  # in each, however they are split
    own = [length - max(common, begin) for length, common in zip(lengths, shared, strict=True)]
    rank = {row: at for at, row in enumerate(order)}
    spread = [
        sorted(rows, key=rank.__getitem__)
        for rows in _spread(_by_length(own, range(len(own))), own, len(neighbours))
    ]

    def worst(micro_batches: MicroBatches) -> int:
        return max(count_shared(rows, lengths, order, shared) for rows in micro_batches)

    return spread if worst(spread) < worst(neighbours) else neighbours


def count_shared(
    rows: Sequence[int], lengths: Sequence[int], order: Sequence[int], shared: Sequence[int]
) -> int:
    """Return how many tokens a micro-batch of `rows` computes, given in the order of `order`."""
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


def _spread(order: Sequence[int], costs: Sequence[int], count: int) -> MicroBatches:
    """Return `count` micro-batches, each row in the one that costs the least so far."""
    micro_batches: MicroBatches = [[] for _ in range(count)]
    totals = [0] * count
    for row in order:
        least = totals.index(min(totals))
        micro_batches[least].append(row)
        totals[least] += costs[row]
    return [rows for rows in micro_batches if rows]


def _split(order: Sequence[int], budget: int, added: AddedCost, multiple: int) -> MicroBatches:
    """Return as few micro-batches as budget and multiple allow, as even as that many can be."""
    most = _round_up(len(_fill(order, budget, added)), multiple, len(order))
    low, high = 1, budget
    while low < high:  # the smallest budget that needs no more micro-batches
        middle = (low + high) // 2
        if len(_fill(order, middle, added)) > most:
            low = middle + 1
        else:
            high = middle
    return _fill(order, low, added)


def _fill(order: Sequence[int], budget: int, added: AddedCost) -> MicroBatches:
    """Return the rows of each micro-batch, filled in the given order."""
    micro_batches: MicroBatches = []
    cost = 0
    for row in order:
        more = added(micro_batches[-1], row) if micro_batches else 0
        if not micro_batches or cost + more > budget:
            micro_batches.append([])
            cost, more = 0, added([], row)
        micro_batches[-1].append(row)
        cost += more
    return micro_batches
