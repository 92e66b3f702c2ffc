"""Pack batches into rows without padding, and split steps into micro-batches of bounded size.

    batch   a₀ a₁ a₂ a₃        row   a₀ a₁ a₂ a₃ b₀ b₁        segments   [0, 4) [4, 6)
            b₀ b₁ ·  ·

Hooks pack the inputs of a model, so that embeddings, blocks and final norm run on packed states.
Pooling and heads use the padded batch; the chunked language head uses packed states. The gradient
of a step does not depend on the split. Micro-batches are as even as possible, and their number is a
multiple of the number of parallel workers.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ftlevel.models.module_tree import get_block_owners

Range = tuple[int, int]


class UnsupportedModelError(NotImplementedError):
    """Raised if a part of the fast step does not support a model."""


@dataclass(frozen=True)
class Segment:
    """Tokens that are consecutive both in the packed row and in their sequence.

    They are at [`start`, `stop`) of the row. `past` has the row's ranges of the sequence's earlier
    tokens.
    """

    start: int
    stop: int
    past: tuple[Range, ...] = ()

    @property
    def position(self) -> int:
        """Number of tokens before this segment in the segment's sequence."""
        return sum(stop - start for start, stop in self.past)


@dataclass(frozen=True)
class PackedLayout:
    """Mapping between a padded batch and its packed row.

    Attributes:
        batch, seq: shape of the padded batch.
        source: (tokens,) index of each token in the flattened padded batch.
        restore: (batch * seq,) packed position of each batch position; arbitrary for padding.
        segments: segments of the packed row, in order.
        needed: (needed,) packed positions of tokens used after the last block; None for all.
        before: tokens of a shared prefix that precede the row in attention only; segments count
            them, `source` and `restore` do not.
        is_for_answers: whether the row is for inference, so that attention may sum in any order.
        padding: number of padding tokens at the end of the row (see `pad_to`); `source` and
            `segments` count them.
    """

    batch: int
    seq: int
    source: Tensor
    restore: Tensor
    segments: tuple[Segment, ...]
    needed: Tensor | None = None
    before: int = 0
    is_for_answers: bool = False
    padding: int = 0

    @classmethod
    def from_mask(cls, mask: Tensor) -> PackedLayout:
        """Returns the layout that packs a batch in order; `mask` (batch, seq) is 0 for padding."""
        flat = mask.flatten() != 0
        restore = (flat.cumsum(0) - 1).clamp(min=0)
        segments, start = [], 0
        for length in mask.sum(dim=1).tolist():
            segments.append(Segment(start, start + length))
            start += length
        batch, seq = mask.shape
        return cls(batch, seq, flat.nonzero()[:, 0], restore, tuple(segments))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedLayout:
        """Returns the layout with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedLayout:
        """Returns the layout with its tensors in pinned memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedLayout:
        tensors = {name: getattr(self, name) for name in ("source", "restore", "needed")}
        mapped: Any = {n: function(t) for n, t in tensors.items() if t is not None}
        return replace(self, **mapped)

    def with_needed_tokens(self, at: Tensor) -> PackedLayout:
        """Returns a copy that needs only tokens `at`, indices in the flattened padded batch."""
        needed = torch.unique(self.restore.index_select(0, at))
        return replace(self, needed=needed if len(needed) < self.tokens else None)

    def pad_to(self, multiple: int) -> PackedLayout:
        """Returns a copy with padding tokens at the end, to a multiple of `multiple` tokens.

        They are copies of the batch's first token that see only each other, so that their states
        are no larger than a token's. `restore` never points at them.
        """
        padding = -self.tokens % multiple
        if not padding:
            return self
        start = self.before + self.tokens
        return replace(
            self,
            source=torch.cat([self.source, self.source.new_zeros(padding)]),
            segments=(*self.segments, Segment(start, start + padding)),
            padding=padding,
        )

    @property
    def tokens(self) -> int:
        """Number of tokens that the blocks compute."""
        return len(self.source)

    @property
    def is_single_row(self) -> bool:
        """Whether the batch is a single row without padding."""
        return self.batch == 1 and self.tokens == self.seq and not self.padding

    @cached_property
    def column(self) -> Tensor:
        """Column of each token in the padded batch, (tokens,)."""
        return self.source % self.seq

    def pack(self, states: Tensor) -> Tensor:
        """Returns `states` (batch or 1, seq, …) as (1, tokens, …)."""
        if states.shape[0] == 1:
            return states.index_select(1, self.column)
        return states.flatten(0, 1).index_select(0, self.source)[None]

    def unpack(self, states: Tensor) -> Tensor:
        """Returns `states` (1, tokens, …) as (batch, seq, …)."""
        return states[0].index_select(0, self.restore).view(self.batch, self.seq, *states.shape[2:])

    def pack_inputs(self, value: Any) -> Any:
        """Returns a model's argument `value`, packed if it is a tensor (batch or 1, seq, …)."""
        is_per_token = (
            isinstance(value, Tensor)
            and value.shape[1:2] == (self.seq,)
            and value.shape[0] in (1, self.batch)
        )
        return self.pack(value) if is_per_token else value


_shared: PackedLayout | None = None
_thread_local = threading.local()


def current_layout() -> PackedLayout | None:
    """Returns the layout set by `using_layout`, or None."""
    layout: PackedLayout | None = getattr(_thread_local, "layout", None)
    return layout or _shared


@contextlib.contextmanager
def using_layout(layout: PackedLayout | None, this_thread: bool = False) -> Iterator[None]:
    """Set the current layout inside the `with` block, which must include the backward pass.

    `layout` is None for a padded batch. With `this_thread` it applies to this thread only, for
    parallel workers on a CPU. Otherwise it applies to the process, because the backward pass on a
    GPU has its own threads and may recompute blocks.
    """
    global _shared
    if this_thread:
        _thread_local.layout, before = layout, getattr(_thread_local, "layout", None)
    else:
        _shared, before = layout, _shared
    try:
        yield
    finally:
        if this_thread:
            _thread_local.layout = before
        else:
            _shared = before


AddedCost = Callable[[Sequence[int], int], int]
"""Rows of a micro-batch and another row → added cost in tokens."""

MicroBatches = list[list[int]]
"""Row indices of each micro-batch."""


def split_padded(lengths: Sequence[int], budget: int, multiple: int = 1) -> MicroBatches:
    """Split rows into padded micro-batches of at most `budget` tokens, longest rows first.

    `lengths` are tokens per row. A row longer than `budget` tokens gets its own micro-batch. If
    there are enough rows, the number of micro-batches is a multiple of `multiple`.
    """
    order = _by_length(lengths)
    return _split(order, budget, lambda rows, row: lengths[rows[0] if rows else row], multiple)


def split_packed(lengths: Sequence[int], budget: int, multiple: int = 1) -> MicroBatches:
    """Split rows into even packed micro-batches (Graham, 1969); arguments as in `split_padded`."""
    order = _by_length(lengths)
    num_batches = _round_up(math.ceil(sum(lengths) / budget), multiple, len(lengths))
    while True:
        micro_batches = _balance(order, lengths, num_batches)
        is_valid = all(
            len(p) == 1 or sum(lengths[row] for row in p) <= budget for p in micro_batches
        )
        if is_valid or num_batches == len(lengths):
            return sorted(micro_batches, key=lambda rows: -sum(lengths[row] for row in rows))
        num_batches = _round_up(num_batches + 1, multiple, len(lengths))


def split_shared(
    lengths: Sequence[int],
    budget: int,
    order: Sequence[int],
    shared: Sequence[int],
    multiple: int = 1,
) -> MicroBatches:
    """Split rows into micro-batches of at most `budget` tokens, counting shared prefixes once.

    `order` sorts rows by prefix; `shared` counts the tokens that each row shares with the previous
    one. Micro-batches are consecutive rows, or balanced ones if the largest then has fewer tokens.
    """
    consecutive = _split(
        order, budget, lambda rows, row: lengths[row] - (shared[row] if rows else 0), multiple
    )
    prefix = min((shared[row] for row in order[1:]), default=0)  # shared in every split
    added_tokens = [
        length - max(common, prefix) for length, common in zip(lengths, shared, strict=True)
    ]
    rank = {row: at for at, row in enumerate(order)}
    balanced = [
        sorted(rows, key=rank.__getitem__)
        for rows in _balance(_by_length(added_tokens), added_tokens, len(consecutive))
    ]

    def max_cost(micro_batches: MicroBatches) -> int:
        return max(count_computed_tokens(rows, lengths, order, shared) for rows in micro_batches)

    return balanced if max_cost(balanced) < max_cost(consecutive) else consecutive


def count_computed_tokens(
    rows: Sequence[int], lengths: Sequence[int], order: Sequence[int], shared: Sequence[int]
) -> int:
    """Returns how many tokens a micro-batch of `rows` computes; arguments as in `split_shared`."""
    rank = {row: at for at, row in enumerate(order)}
    cost, before = 0, -1
    for row in rows:
        at = rank[row]
        between = order[before + 1 : at + 1]
        cost += lengths[row] - (min(shared[other] for other in between) if before >= 0 else 0)
        before = at
    return cost


def _by_length(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])  # stable: ties keep order


def _round_up(number: int, multiple: int, limit: int) -> int:
    return min(limit, math.ceil(number / multiple) * multiple)


def _balance(order: Sequence[int], costs: Sequence[int], num_batches: int) -> MicroBatches:
    micro_batches: MicroBatches = [[] for _ in range(num_batches)]
    batch_costs = [0] * num_batches
    for row in order:
        smallest = batch_costs.index(min(batch_costs))
        micro_batches[smallest].append(row)
        batch_costs[smallest] += costs[row]
    return [rows for rows in micro_batches if rows]


def _split(order: Sequence[int], budget: int, added: AddedCost, multiple: int) -> MicroBatches:
    """Split rows, in `order`, into few, even micro-batches; `added` is the cost of adding a row."""
    num_batches = _round_up(len(_fill(order, budget, added)), multiple, len(order))
    low, high = 1, budget
    while low < high:  # the smallest budget that needs no more micro-batches
        middle = (low + high) // 2
        if len(_fill(order, middle, added)) > num_batches:
            low = middle + 1
        else:
            high = middle
    return _fill(order, low, added)


def _fill(order: Sequence[int], budget: int, added: AddedCost) -> MicroBatches:
    micro_batches: MicroBatches = []
    cost = 0
    for row in order:
        added_cost = added(micro_batches[-1], row) if micro_batches else 0
        if not micro_batches or cost + added_cost > budget:
            micro_batches.append([])
            cost, added_cost = 0, added([], row)
        micro_batches[-1].append(row)
        cost += added_cost
    return micro_batches


class PackedModel:
    """Hooks that pack the inputs of transformers model `model` and pad its last hidden states.

    The inputs, (batch, seq, …), are packed before the embeddings. The states are padded where the
    module that holds the blocks returns them, unless `keep_packed` applies. Raises
    UnsupportedModelError if the model does not accept positions.
    """

    def __init__(self, model: nn.Module) -> None:
        owners = get_block_owners(model)
        base, self._names = _find_base(owners)
        self._padding_idx = _get_padding_idx(base)
        self._hooks = [
            base.register_forward_pre_hook(self._pack, with_kwargs=True, prepend=True),
            owners[0].register_forward_hook(_unpack),
        ]

    def remove(self) -> None:
        """Remove the hooks from the model, which then computes padded batches."""
        for hook in self._hooks:
            hook.remove()

    def _pack(
        self,
        base: nn.Module,  # noqa: ARG002 - the signature of a hook
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        layout = current_layout()
        if layout is None or layout.is_single_row:
            return None
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        packed = {name: layout.pack_inputs(value) for name, value in inputs.items()}
        if packed.get("position_ids") is None:
            packed["position_ids"] = layout.column[None]
            if self._padding_idx is not None:
                is_token = inputs["input_ids"] != self._padding_idx
                positions = is_token.cumsum(1) * is_token + self._padding_idx
                packed["position_ids"] = layout.pack(positions)
        return (), packed


def _find_base(owners: Sequence[nn.Module]) -> tuple[nn.Module, list[str]]:
    """Returns the innermost of `owners` that embeds tokens, and the names of its arguments."""
    for owner in owners:
        names = list(inspect.signature(owner.forward).parameters)
        if {"input_ids", "position_ids"} <= set(names):
            return owner, names
    raise UnsupportedModelError("it computes positions itself")


def _get_padding_idx(base: nn.Module) -> int | None:
    """Returns the padding index of a model that counts positions from it (RoBERTa), else None."""
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.padding_idx
    return None


def _unpack(
    owner: nn.Module,  # noqa: ARG001 - the signature of a hook
    args: tuple[Any, ...],  # noqa: ARG001 - the signature of a hook
    output: Any,
) -> Any:
    layout = current_layout()
    if layout is None or layout.is_single_row or getattr(_thread_local, "keeps_packed", False):
        return None
    if isinstance(output, Tensor):
        return layout.unpack(output)
    if isinstance(output, tuple):
        return (layout.unpack(output[0]), *output[1:])
    first = next(iter(output))  # a ModelOutput
    output[first] = layout.unpack(output[first])
    return output


@contextlib.contextmanager
def keep_packed() -> Iterator[None]:
    """Keep the last hidden states of a `PackedModel` packed in this thread's `with` block."""
    _thread_local.keeps_packed = True
    try:
        yield
    finally:
        _thread_local.keeps_packed = False
