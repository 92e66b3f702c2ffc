"""How the tokens of a padded batch stand in one row without padding, and the way back.

    batch   a₀ a₁ a₂ a₃        row   a₀ a₁ a₂ a₃ b₀ b₁        segments   [0, 4) [4, 6)
            b₀ b₁ ·  ·

The blocks of a model see the row, and everything before and after them sees the batch: embeddings,
positions, norms, heads and pooling stay the model's own, and right for any model.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

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
