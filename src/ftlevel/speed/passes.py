"""Cut the rows of an optimizer step into passes through the model of a bounded size.

The gradient of a step is the sum over its passes, however they are cut; what is cut well costs less
and holds less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

AddedCost = Callable[[Sequence[int], int], int]
"""The rows of a pass and a row → what the pass costs more with it, in tokens."""


def cut_padded(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return the rows of each pass, longest first, a pass costing its rows times the longest.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a pass; a longer row has a pass of its own.
    """
    return _cut(_by_length(lengths), budget, lambda rows, row: lengths[rows[0] if rows else row])


def cut_packed(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return the rows of each pass, longest first, a pass costing the tokens of its rows."""
    return _cut(_by_length(lengths), budget, lambda _, row: lengths[row])


def cut_shared(
    lengths: Sequence[int], budget: int, order: Sequence[int], shared: Sequence[int]
) -> list[list[int]]:
    """Return the rows of each pass, neighbours of `order`, a pass costing shared tokens once.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a pass.
        order: the rows by their prefixes.
        shared: for each row what it shares with the one before it in `order`.
    """
    return _cut(order, budget, lambda rows, row: lengths[row] - (shared[row] if rows else 0))


def _by_length(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])  # stable: ties keep order


def _cut(order: Sequence[int], budget: int, added: AddedCost) -> list[list[int]]:
    """Return as few passes as the budget allows, as even as that many can be."""
    fewest = len(_fill(order, budget, added))
    low, high = 1, budget
    while low < high:  # the smallest budget that needs no more passes
        middle = (low + high) // 2
        if len(_fill(order, middle, added)) > fewest:
            low = middle + 1
        else:
            high = middle
    return _fill(order, low, added)


def _fill(order: Sequence[int], budget: int, added: AddedCost) -> list[list[int]]:
    """Return the rows of each pass, filled in the given order."""
    passes: list[list[int]] = []
    cost = 0
    for row in order:
        more = added(passes[-1], row) if passes else 0
        if not passes or cost + more > budget:
            passes.append([])
            cost, more = 0, added([], row)
        passes[-1].append(row)
        cost += more
    return passes
