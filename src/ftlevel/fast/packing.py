"""How the tokens of a padded batch stand in one row without padding, and the way back.

    batch   a₀ a₁ a₂ a₃        row   a₀ a₁ a₂ a₃ b₀ b₁        segments   [0, 4) [4, 6)
            b₀ b₁ ·  ·

The blocks of a model see the row, and everything before and after them sees the batch: embeddings,
positions, norms, heads and pooling stay the model's own, and right for any model.

Split the rows of an optimizer step into micro-batches of a bounded size.

The gradient of a step is the sum over its micro-batches, however they are split; what is split well
costs less and holds less. They are as even as they can be, and a multiple of the parallel workers.

Let the blocks of a model see rows without padding, by hooks on them.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

Range = tuple[int, int]


class NotServedError(NotImplementedError):
    """A model asks for what a part of the fast step does not compute; the plain way does."""


@dataclass(frozen=True)
class Segment:
    """Tokens that follow one another in the row and in a sequence.

    Attributes:
        start, stop: where they stand in the row.
        past: where the tokens before them in the sequence stand, first to last; empty for a
            sequence's beginning.
    """

    start: int
    stop: int
    past: tuple[Range, ...] = ()

    @property
    def position(self) -> int:
        """The position of the first token in its sequence."""
        return sum(stop - start for start, stop in self.past)


@dataclass(frozen=True)
class PackedLayout:
    """The tokens of a batch in one row.

    Attributes:
        batch, seq: shape of the padded batch.
        source: (tokens,) index of each token of the row in the flattened batch.
        restore: (batch * seq,) index in the row of each place of the flattened batch; padding
            points at some token, and nothing that counts may use it.
        segments: what the row is made of, in its order.
        needed: (needed,) index in the row of each token whose states after the last block count,
            ascending; None for all.
        before: tokens of a shared prefix (`prefixes.shared_prefix`) that stand before the row in
            every attention, but not in it; the places of segments and pasts count them, `source`
            and `restore` do not.
    """

    batch: int
    seq: int
    source: torch.Tensor
    restore: torch.Tensor
    segments: tuple[Segment, ...]
    needed: torch.Tensor | None = None
    before: int = 0

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> PackedLayout:
        """Return the layout of the rows of a batch, one after the other.

        Args:
            mask: (batch, seq), 1 for a token and 0 for padding.
        """
        flat = mask.flatten() != 0
        restore = (flat.cumsum(0) - 1).clamp(min=0)
        segments, start = [], 0
        for length in mask.sum(dim=1).tolist():
            segments.append(Segment(start, start + length))
            start += length
        batch, seq = mask.shape
        return cls(batch, seq, flat.nonzero()[:, 0], restore, tuple(segments))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedLayout:
        """Return the layout with its indices on `device`."""
        source = self.source.to(device, non_blocking=non_blocking)
        restore = self.restore.to(device, non_blocking=non_blocking)
        needed = self.needed
        if needed is not None:
            needed = needed.to(device, non_blocking=non_blocking)
        return replace(self, source=source, restore=restore, needed=needed)

    def pin_memory(self) -> PackedLayout:
        """Return the layout with its indices where a copy onto a GPU need not be waited for."""
        pinned = {name: getattr(self, name) for name in ("source", "restore", "needed")}
        return replace(self, **{n: t.pin_memory() for n, t in pinned.items() if t is not None})

    def needing(self, at: torch.Tensor) -> PackedLayout:
        """Return the layout of which the places `at` of the flattened batch are needed."""
        needed = torch.unique(self.restore.index_select(0, at))
        return replace(self, needed=needed if len(needed) < self.tokens else None)

    @property
    def tokens(self) -> int:
        """How many tokens go through the blocks."""
        return len(self.source)

    @property
    def is_whole_row(self) -> bool:
        """Whether the batch is the row: one row, all of whose tokens are computed."""
        return self.batch == 1 and self.tokens == self.seq

    def is_padded(self, states: torch.Tensor) -> bool:
        """Whether `states` (…, …, width) are those of the batch, and not yet of the row."""
        return states.shape[0] == self.batch and states.shape[1] == self.seq

    @cached_property
    def column(self) -> torch.Tensor:
        """(tokens,) the column of the batch that each token of the row stands in."""
        return self.source % self.seq

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """Return `states` (batch or 1, seq, …) as (1, tokens, …)."""
        if states.shape[0] == 1:
            return states.index_select(1, self.column)
        return states.flatten(0, 1).index_select(0, self.source)[None]

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Return `states` (1, tokens, …) as (batch, seq, …)."""
        flat = states[0].index_select(0, self.restore)
        return flat.view(self.batch, self.seq, *states.shape[2:])

    def pack_inputs(self, value: Any) -> Any:
        """Return an argument of a block with every tensor that has a place for each token packed.

        Such are the angles of rotary embeddings (1 or batch, seq, width), alone or in a tuple.
        """
        if isinstance(value, torch.Tensor):
            is_per_token = value.dim() > 1 and value.shape[1] == self.seq
            return self.pack(value) if is_per_token and value.shape[0] in (1, self.batch) else value
        if isinstance(value, tuple | list):
            return type(value)(self.pack_inputs(part) for part in value)
        return value


_shared: PackedLayout | None = None
_own = threading.local()


def current_layout() -> PackedLayout | None:
    """Return the layout that is being computed on, or None."""
    own: PackedLayout | None = getattr(_own, "layout", None)
    return own or _shared


@contextlib.contextmanager
def using_layout(layout: PackedLayout | None, own_thread: bool = False) -> Iterator[None]:
    """Compute on `layout` inside the block, which must hold the backward pass too.

    Args:
        layout: None for a padded batch.
        own_thread: whether the layout is this thread's alone, as that of a parallel worker on a
            CPU. Otherwise it is the process's: on a GPU the backward pass has threads of its own,
            and with checkpointing it runs the blocks again.
    """
    global _shared
    if own_thread:
        _own.layout, before = layout, getattr(_own, "layout", None)
    else:
        _shared, before = layout, _shared
    try:
        yield
    finally:
        if own_thread:
            _own.layout = before
        else:
            _shared = before


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


class PackedBlocks:
    """Hooks that lay a batch out before the first block and pad it again after the last one.

    Blocks that a model goes through several times (ALBERT) are packed and padded each time.

    Args:
        blocks: the blocks of the model, in their order (mutated).
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._hooks = [
            block.register_forward_pre_hook(_enter, with_kwargs=True, prepend=True)
            for block in blocks
        ]
        self._hooks.append(blocks[-1].register_forward_hook(_leave))

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _enter(
    block: nn.Module,  # noqa: ARG001 - the signature of a hook
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pack what a block is called with; the blocks after the first get their states packed."""
    layout = current_layout()
    if layout is None or layout.is_whole_row:
        return None
    states, *others = args if args else (kwargs["hidden_states"],)
    if layout.is_padded(states):
        states = layout.pack(states)
    kwargs = {name: layout.pack_inputs(value) for name, value in kwargs.items()}
    if args:
        return (states, *(layout.pack_inputs(value) for value in others)), kwargs
    return (), {**kwargs, "hidden_states": states}


def _leave(
    block: nn.Module,  # noqa: ARG001 - the signature of a hook
    args: tuple[Any, ...],  # noqa: ARG001 - the signature of a hook
    output: Any,
) -> Any:
    """Pad what the last block returns: its states, alone or first in a tuple."""
    layout = current_layout()
    if layout is None or layout.is_whole_row:
        return None
    if isinstance(output, torch.Tensor):
        return layout.unpack(output)
    return (layout.unpack(output[0]), *output[1:])
