"""Compute prefixes shared by rows once: in a tree of segments, or before all micro-batches.

    rows  s s s a a     segments  s s s | a a | b     each attends to itself and to its past;
          s s s b                                     positions continue from the past

    ∂L/∂θ = Σₚ ∂Lₚ/∂θ + (Σₚ ∂Lₚ/∂(K, V)) · ∂(K, V)/∂θ   (micro-batches p after a shared prefix)

States of a causal model depend only on previous tokens, so sharing them is exact; the loss still
counts the targets of every row. A tree computes a prefix once per micro-batch. A `SharedPrefix` is
computed before all micro-batches, which prepend its keys and values; its backward pass runs once,
after theirs. (Prompt trees: Scaled Cognition, 2025; Prefix Grouper: arXiv 2506.05433.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ftlevel.fast.packing import PackedLayout, Range, Segment, UnsupportedModelError

Gradients = Sequence[Tensor | None]


class SharedPrefix:
    """Keys and values of a shared prefix of `tokens` tokens, for all attention layers."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._states: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._leaves: dict[nn.Module, tuple[Tensor, Tensor]] | None = None

    def close(self) -> None:
        """Detach the collected keys and values, for use in the step's micro-batches."""
        self._leaves = {
            module: (
                key.detach().requires_grad_(key.requires_grad),
                value.detach().requires_grad_(value.requires_grad),
            )
            for module, (key, value) in self._states.items()
        }

    def join(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Collect the prefix's keys and values; after `close`, prepend them to `key` and `value`.

        `query` is (1, heads, own, head_dim), `key` and `value` are (1, key heads, own, …). After
        `close`, results have `tokens` + own positions; queries of the prefix are zeros. Raises
        UnsupportedModelError if a layer runs twice, or was not called for the prefix.
        """
        if self._leaves is None:
            if module in self._states:
                raise UnsupportedModelError("its blocks run more than once")
            self._states[module] = (key, value)
            return query, key, value
        if module not in self._leaves:
            raise UnsupportedModelError("its micro-batches do not run the same blocks")
        before = self._leaves[module]
        empty = query.new_zeros(*query.shape[:2], self.tokens, query.shape[3])
        pairs = ((empty, query), (before[0], key), (before[1], value))
        states = [torch.cat([first.to(part.dtype), part], dim=2) for first, part in pairs]
        return states[0], states[1], states[2]

    @property
    def leaves(self) -> list[Tensor]:
        """Detached keys and values that receive gradients, in the order of the layers."""
        return [part for _, part in self._with_graph()]

    def gradients(self, of_leaves: Gradients, parameters: Sequence[Tensor]) -> Gradients:
        """Returns the gradients of `parameters`, given those of `leaves`; frees the graph."""
        tensors = [part for part, _ in self._with_graph()]
        pairs = [(m, g) for m, g in zip(tensors, of_leaves, strict=True) if g is not None]
        if not pairs:
            return [None] * len(parameters)
        outputs, incoming = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, parameters, incoming, allow_unused=True)

    def _with_graph(self) -> list[tuple[Tensor, Tensor]]:
        """Returns (tensor with graph, detached leaf) of keys and values that require a gradient."""
        leaves = self._leaves or {}
        return [
            (tensor, leaf)
            for module, pair in self._states.items()
            for tensor, leaf in zip(pair, leaves[module], strict=True)
            if tensor.requires_grad
        ]


_thread_local = threading.local()


def current_prefix() -> SharedPrefix | None:
    """Returns the prefix set by `using_prefix` in this thread, or None."""
    return getattr(_thread_local, "shared_prefix", None)


@contextlib.contextmanager
def using_prefix(shared_prefix: SharedPrefix | None) -> Iterator[None]:
    """Set the current shared prefix of this thread inside the `with` block."""
    _thread_local.shared_prefix, before = shared_prefix, current_prefix()
    try:
        yield
    finally:
        _thread_local.shared_prefix = before


MIN_PREFIX = 32
"""Minimum tokens of a shared prefix; below, splitting the rows costs more than it saves."""

Tokens = list[int]


def common_prefix_length(one: Tokens, other: Tokens) -> int:
    """Returns the length of the common prefix of `one` and `other`."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def sort_by_prefix(
    rows: Sequence[Tokens], min_length: int = MIN_PREFIX
) -> tuple[list[int], list[int]]:
    """Returns row indices in lexicographic order, and each row's number of shared tokens.

    The shared tokens, indexed by row, are the prefix that a row has in common with the previous row
    in the order; prefixes shorter than `min_length` tokens count as 0.
    """
    order = sorted(range(len(rows)), key=lambda row: rows[row])
    shared = [0] * len(rows)
    for before, row in pairwise(order):
        length = common_prefix_length(rows[before], rows[row])
        shared[row] = length if length >= min_length else 0
    return order, shared


def shared_fraction(rows: Sequence[Tokens]) -> float:
    """Returns the fraction of the tokens of `rows` saved if shared prefixes are computed once."""
    _, shared = sort_by_prefix(rows)
    return sum(shared) / sum(len(row) for row in rows)


def create_prefix_tree(
    rows: Sequence[Tokens], min_length: int = MIN_PREFIX, before: int = 0
) -> PackedLayout:
    """Returns the layout of `rows`, padded on the right, in which each shared prefix occurs once.

    `rows` are in the order of `sort_by_prefix`; their first `before` tokens are left out.
    """
    return _Tree(rows, min_length, before).layout()


class _Tree:
    """Builds a prefix tree's layout: shared tokens, then the rest of the rows that share them."""

    def __init__(self, rows: Sequence[Tokens], min_length: int, before: int) -> None:
        self._rows = rows
        self._min_length = min_length
        self._before = before
        self._shared_lengths = [0, *(common_prefix_length(a, b) for a, b in pairwise(rows))]
        self._seq = max(len(row) for row in rows)
        self._source: list[int] = []
        self._restore = torch.zeros(len(rows), self._seq, dtype=torch.long)
        self._segments: list[Segment] = []

    def layout(self) -> PackedLayout:
        shared_prefix = ((0, self._before),) if self._before else ()
        self._add_rows(range(len(self._rows)), self._before, shared_prefix)
        return PackedLayout(
            len(self._rows),
            self._seq,
            torch.tensor(self._source),
            self._restore.flatten(),
            tuple(self._segments),
            before=self._before,
        )

    def _add_rows(self, rows: range, depth: int, past: tuple[Range, ...]) -> None:
        first = rows.start
        for row in (*rows[1:], rows.stop):
            if row < rows.stop and self._shared_lengths[row] >= depth + self._min_length:
                continue
            self._add(range(first, row), depth, past)
            first = row

    def _add(self, rows: range, depth: int, past: tuple[Range, ...]) -> None:
        """Add what `rows` share after their first `depth` tokens (ranges `past`), then the rest."""
        first = rows.start
        end = min((self._shared_lengths[row] for row in rows[1:]), default=len(self._rows[first]))
        if end > depth:
            start = len(self._source)
            stop = start + end - depth
            self._source += range(first * self._seq + depth, first * self._seq + end)
            self._restore[first : rows.stop, depth:end] = torch.arange(start, stop)
            segment = (self._before + start, self._before + stop)
            self._segments.append(Segment(*segment, past))
            past = (*past, segment)
        if len(rows) > 1:
            self._add_rows(rows, end, past)
