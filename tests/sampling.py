"""A fixed sample of a sweep's cells; `make sweeps` runs all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest


def every(number: int, cells: Sequence[Any]) -> list[Any]:
    """Return the cells as parameters, all but each `number`-th with the marker `sweep`."""
    tuples = [cell if isinstance(cell, tuple) else (cell,) for cell in cells]
    return [
        pytest.param(*cell, marks=pytest.mark.sweep if at % number else [])
        for at, cell in enumerate(tuples)
    ]


def sample(cells: Sequence[Sequence[Any]], times: int = 1) -> list[Any]:
    """Return the cells as parameters, all but a fixed sample with the marker `sweep`.

    In the sample each value of each position occurs `times` times, or as often as in all cells.
    """
    sides = [tuple(enumerate(map(repr, cell))) for cell in cells]
    occurs = Counter(side for own in sides for side in own)
    missing = {side: min(times, count) for side, count in occurs.items()}
    chosen: set[int] = set()
    while any(missing.values()):
        left = (at for at in range(len(cells)) if at not in chosen)
        best = max(left, key=lambda at: sum(missing[side] > 0 for side in sides[at]))
        chosen.add(best)
        missing |= {side: max(missing[side] - 1, 0) for side in sides[best]}
    return [
        pytest.param(*cell, marks=[] if at in chosen else pytest.mark.sweep)
        for at, cell in enumerate(cells)
    ]
