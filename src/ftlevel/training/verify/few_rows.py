"""The few rows on which every run compares its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.encoding.fit import prompt_length

FEW_TOKENS = 256
"""Two short rows, or a few: what costs less than one step of most runs."""
FEW_ROWS = 4
LOOKED_AT = 64
LONGEST = 1_024
"""A row that cannot be cut is left out where it is longer."""


def choose_few(rows: Sequence[Encoded]) -> list[Encoded]:
    """Return the shortest of the first rows, cut where that can be, or none if all are long."""
    first = [short for row in rows[:LOOKED_AT] if (short := shorten(row, FEW_TOKENS // 2))]
    chosen: list[Encoded] = []
    tokens = 0
    for row in sorted(first, key=lambda row: len(row.input_ids)):
        tokens += len(row.input_ids)
        if len(chosen) >= 2 and (tokens > FEW_TOKENS or len(chosen) == FEW_ROWS):
            break
        chosen.append(row)
    return chosen


def shorten(row: Encoded, size: int) -> Encoded | None:
    """Return `row` with `size` tokens at most, or as it is; None if it is long and cannot be cut.

    A row with a label a token is cut to what leads to its last target; one with a number to learn
    to its beginning. Others, such as spans, have labels that count tokens.
    """
    length = len(row.input_ids)
    if length <= size:
        return row
    labels = row.labels
    if len(row.branches) > 1:  # answers stay whole, and so does what tells them apart
        surplus = min(length - size, (prompt_length(row) or 1) - 1)
        return row.without(surplus) if surplus > 0 and length - surplus <= LONGEST else None
    if isinstance(labels, list) and len(labels) == length:
        end = max((at + 1 for at, label in enumerate(labels) if label != IGNORED), default=length)
        kept = slice(max(0, end - size), max(end, size))
        labels = labels[kept]
    elif isinstance(labels, int | float):
        kept = slice(0, size)
    else:
        return row if length <= LONGEST else None
    extras = {name: values[kept] for name, values in row.extras.items()}
    return replace(row, input_ids=row.input_ids[kept], labels=labels, extras=extras)
