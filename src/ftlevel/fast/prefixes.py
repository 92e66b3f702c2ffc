"""What all rows of a step begin with, computed once for all of its micro-batches.

    prefix          s s s        a micro-batch of its own, whose keys and values every attention
    micro-batches   · · · a a    keeps and puts before those of the others: they compute what comes
                    · · · b b    after it, and their gradients of its keys and values are added

A micro-batch with a tree of prefixes (`prefixes.tree`) computes each once, and two micro-batches
compute it twice. The gradient of the shared prefix is the sum over the micro-batches, through one
backward pass of its own:

    ∂L/∂θ = Σₚ ∂Lₚ/∂θ + (Σₚ ∂Lₚ/∂(K, V)) · ∂(K, V)/∂θ

Rows that begin alike, computed once: a batch as a tree of segments.

    rows  s s s a a     segments  s s s | a a | b     each attends to itself and to its past,
          s s s b                                     positions go on from the past

A state of a causal model depends on the tokens before it and on nothing else, so rows that share a
prefix share its states, exactly. What is predicted from them is not shared: every row's targets are
counted, and their gradients meet where the rows do. (Prompt trees: Scaled Cognition, 2025; Prefix
Grouper: arXiv 2506.05433.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import nn

from ftlevel.fast.packing import NotServedError, PackedLayout, Range, Segment

Gradients = Sequence[torch.Tensor | None]


class SharedPrefix:
    """Keys and values of the shared prefix, of every attention of a model.

    Attributes:
        tokens: how many it has.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._made: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._leaves: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] | None = None

    def close(self) -> None:
        """Take what its own micro-batch has made as what goes before every other micro-batch."""
        self._leaves = {
            module: (
                key.detach().requires_grad_(key.requires_grad),
                value.detach().requires_grad_(value.requires_grad),
            )
            for module, (key, value) in self._made.items()
        }

    def join(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keep keys and values in the prefix's own micro-batch; put them before those of any other.

        Args:
            module: the attention that asks.
            query: (1, heads, own, head_dim).
            key: (1, key heads, own, head_dim).
            value: (1, key heads, own, value_dim).

        Returns:
            The three, of (…, tokens + own, …) where the prefix is done; its queries are zeros.

        Raises:
            NotServedError: an attention is gone through twice, or the prefix did not meet it.
        """
        if self._leaves is None:
            if module in self._made:
                raise NotServedError("its blocks are gone through more than once")
            self._made[module] = (key, value)
            return query, key, value
        if module not in self._leaves:
            raise NotServedError("its micro-batches do not go through the same blocks")
        before = self._leaves[module]
        empty = query.new_zeros(*query.shape[:2], self.tokens, query.shape[3])
        pairs = ((empty, query), (before[0], key), (before[1], value))
        joined = [torch.cat([first.to(own.dtype), own], dim=2) for first, own in pairs]
        return joined[0], joined[1], joined[2]

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Keys and values that a micro-batch gives a gradient, in the order of the attentions."""
        return [part for _, part in self._with_graph()]

    def gradients(self, of_leaves: Gradients, parameters: Sequence[torch.Tensor]) -> Gradients:
        """Return the gradients of `parameters` through the prefix, which lets go of its graph.

        Args:
            of_leaves: the sum over the micro-batches of the gradients of `leaves`; None for none.
            parameters: what is trained.
        """
        made = [part for part, _ in self._with_graph()]
        pairs = [(m, g) for m, g in zip(made, of_leaves, strict=True) if g is not None]
        if not pairs:
            return [None] * len(parameters)
        outputs, incoming = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, parameters, incoming, allow_unused=True)

    def _with_graph(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what was made and its leaf, for all that has a gradient."""
        leaves = self._leaves or {}
        return [
            (made, leaf)
            for module, pair in self._made.items()
            for made, leaf in zip(pair, leaves[module], strict=True)
            if made.requires_grad
        ]


_own = threading.local()


def current_prefix() -> SharedPrefix | None:
    """Return the shared prefix of the micro-batch that this thread computes, or None."""
    shared_prefix: SharedPrefix | None = getattr(_own, "shared_prefix", None)
    return shared_prefix


@contextlib.contextmanager
def using_prefix(shared_prefix: SharedPrefix | None) -> Iterator[None]:
    """Compute the micro-batch of `shared_prefix` inside the block, or one that goes on from it."""
    _own.shared_prefix, before = shared_prefix, current_prefix()
    try:
        yield
    finally:
        _own.shared_prefix = before


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
