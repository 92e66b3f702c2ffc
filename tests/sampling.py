"""A fixed sample of a sweep's cells; `make sweeps` runs all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest


def every(number: int, cells: Sequence[Any]) -> list[Any]:
    """Return the cells as parameters; only each `number`-th one lacks the marker `sweep`."""
    tuples = [cell if isinstance(cell, tuple) else (cell,) for cell in cells]
    return [
        pytest.param(*cell, marks=pytest.mark.sweep if index % number else [])
        for index, cell in enumerate(tuples)
    ]


def sample(cells: Sequence[Sequence[Any]], times: int = 1) -> list[Any]:
    """Return the cells as parameters, all except a fixed sample with the marker `sweep`.

    In the sample, each value of each position occurs `times` times, or as often as in all cells.
    """
    values = [tuple(enumerate(map(repr, cell))) for cell in cells]
    counts = Counter(value for cell_values in values for value in cell_values)
    missing = {value: min(times, count) for value, count in counts.items()}
    chosen: set[int] = set()
    while any(missing.values()):
        candidates = (index for index in range(len(cells)) if index not in chosen)
        best = max(candidates, key=lambda index: sum(missing[value] > 0 for value in values[index]))
        chosen.add(best)
        missing |= {value: max(missing[value] - 1, 0) for value in values[best]}
    return [
        pytest.param(*cell, marks=[] if index in chosen else pytest.mark.sweep)
        for index, cell in enumerate(cells)
    ]
