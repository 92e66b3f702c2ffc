"""Rows that begin alike, computed once: a batch as a tree of segments.

    rows  s s s a a     segments  s s s | a a | b     each attends to itself and to its past,
          s s s b                                     positions go on from the past

A state of a causal model depends on the tokens before it and on nothing else, so rows that share a
prefix share its states, exactly. What is predicted from them is not shared: every row's targets are
counted, and their gradients meet where the rows do. (Prompt trees: Scaled Cognition, 2025; Prefix
Grouper: arXiv 2506.05433.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from ftlevel.fast.packing.layout import PackedLayout, Range, Segment

MIN_PREFIX = 32
"""A shorter common prefix is not shared: cutting the rows would cost more than it saves."""

Tokens = list[int]


def count_common(one: Tokens, other: Tokens) -> int:
    """Return how many tokens `one` and `other` have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def sort_by_prefix(rows: Sequence[Tokens], least: int = MIN_PREFIX) -> tuple[list[int], list[int]]:
    """Return the rows in an order in which those that begin alike are neighbours.

    Args:
        rows: token ids of each row.
        least: shortest prefix that is shared.

    Returns:
        The order, and for each row how many tokens it shares with the one before it in the order.
    """
    order = sorted(range(len(rows)), key=lambda row: rows[row])
    shared = [0] * len(rows)
    for before, row in pairwise(order):
        common = count_common(rows[before], rows[row])
        shared[row] = common if common >= least else 0
    return order, shared


def shared_fraction(rows: Sequence[Tokens]) -> float:
    """Return which part of the tokens of `rows` need not be computed, from 0 to 1."""
    _, shared = sort_by_prefix(rows)
    return sum(shared) / sum(len(row) for row in rows)


def build_prefix_tree(
    rows: Sequence[Tokens], least: int = MIN_PREFIX, before: int = 0
) -> PackedLayout:
    """Return the layout of `rows`, padded on the right to the longest, with shared prefixes once.

    Args:
        rows: token ids, in the order of `sort_by_prefix`.
        least: shortest prefix that is shared.
        before: tokens that all rows begin with and a shared prefix computes; each row has more.
    """
    return _Tree(rows, least, before).layout()


class _Tree:
    """Grows the segments of a layout, parents first."""

    def __init__(self, rows: Sequence[Tokens], least: int, before: int) -> None:
        self._rows = rows
        self._least = least
        self._before = before
        self._common = [0, *(count_common(a, b) for a, b in pairwise(rows))]
        self._seq = max(len(row) for row in rows)
        self._source: list[int] = []
        self._restore = torch.zeros(len(rows), self._seq, dtype=torch.long)
        self._segments: list[Segment] = []

    def layout(self) -> PackedLayout:
        shared_prefix = ((0, self._before),) if self._before else ()
        self._grow(range(len(self._rows)), self._before, shared_prefix)
        return PackedLayout(
            len(self._rows),
            self._seq,
            torch.tensor(self._source),
            self._restore.flatten(),
            tuple(self._segments),
            before=self._before,
        )

    def _grow(self, rows: range, depth: int, past: tuple[Range, ...]) -> None:
        """Add what `rows`, which share their first `depth` tokens, have beyond them."""
        begin = rows.start
        for row in (*rows[1:], rows.stop):
            if row < rows.stop and self._common[row] >= depth + self._least:
                continue
            self._add(range(begin, row), depth, past)
            begin = row

    def _add(self, rows: range, depth: int, past: tuple[Range, ...]) -> None:
        """Add the common beginning of `rows` beyond `depth`, then their ends."""
        first = rows.start
        until = min((self._common[row] for row in rows[1:]), default=len(self._rows[first]))
        if until > depth:
            start = len(self._source)
            stop = start + until - depth
            self._source += range(first * self._seq + depth, first * self._seq + until)
            self._restore[first : rows.stop, depth:until] = torch.arange(start, stop)
            own = (self._before + start, self._before + stop)
            self._segments.append(Segment(*own, past))
            past = (*past, own)
        if len(rows) > 1:
            self._grow(rows, until, past)
