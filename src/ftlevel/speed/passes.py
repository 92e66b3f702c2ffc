"""Cut the rows of an optimizer step into passes through the model of a bounded size.

The gradient of a step is the sum over its passes, however they are cut; what is cut well costs less
and holds less. Rows of like length stand together, so that what is padded is padded little.
"""

from __future__ import annotations

from collections.abc import Sequence


def cut_passes(lengths: Sequence[int], budget: int, *, is_padded: bool) -> list[list[int]]:
    """Return the rows of each pass, longest first.

    As few passes as the budget allows, and as even as that many can be.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a pass; a longer row has a pass of its own.
        is_padded: whether a pass costs its rows times the longest of them.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])  # stable: ties keep order
    fewest = _fill(order, lengths, budget, is_padded=is_padded)
    low, high = min(max(lengths), budget), budget
    while low < high:  # the smallest budget that needs no more passes
        middle = (low + high) // 2
        if len(_fill(order, lengths, middle, is_padded=is_padded)) > len(fewest):
            low = middle + 1
        else:
            high = middle
    return _fill(order, lengths, low, is_padded=is_padded)


def _fill(
    order: Sequence[int], lengths: Sequence[int], budget: int, *, is_padded: bool
) -> list[list[int]]:
    """Return the rows of each pass, filled in the given order."""
    passes: list[list[int]] = []
    held = 0
    for row in order:
        if passes:
            rows = passes[-1]
            cost = lengths[rows[0]] * (len(rows) + 1) if is_padded else held + lengths[row]
        if not passes or cost > budget:
            passes.append([])
            held = 0
        passes[-1].append(row)
        held += lengths[row]
    return passes
