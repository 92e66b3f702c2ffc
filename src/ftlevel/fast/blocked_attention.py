"""Attention of many short sequences by batched matrix products over blocks of queries.

    P = softmax(s · Q Kᵀ + M),  O = P V
    dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ − rowsum(dO Vᵀ ∘ P)),  dQ = s · dS K,  dK = s · dSᵀ Q

s is the scale, M the mask. Softcap c (Gemma 2): S = c · tanh(s · Q Kᵀ / c), dS times 1 − (S/c)². A
block is up to 128 queries of a sequence and their visible keys, which skips half of the products of
a causal sequence. P is saved for short sequences and recomputed for long ones. Up to 1,024 tokens,
torch's CPU flash kernel takes 2 to 4 times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ftlevel.fast.packing import Range, Segment
from ftlevel.fast.recompute import dropout_mask
from ftlevel.models.upstream.tensors import softmax_backward

QUERIES = 128
"""Queries per block; the fastest of 64, 128 and 256 in bfloat16."""

MAX_SAVED_KEYS = 256
"""Maximum keys of a block whose probabilities are saved for the backward pass."""


@dataclass(frozen=True)
class QueryBlock:
    """A block of queries, and the keys that at least one of these queries sees.

    Attributes:
        start, stop: range of the queries in the packed row.
        keys: ranges of the keys in the packed row, in sequence order.
        mask: added to the scores of the last keys (-inf hides a key); None if all are visible.
    """

    start: int
    stop: int
    keys: tuple[Range, ...]
    mask: Tensor | None

    @property
    def width(self) -> int:
        """Total number of keys in the ranges `keys`."""
        return sum(stop - start for start, stop in self.keys)


@lru_cache(maxsize=512)
def create_visibility_mask(
    position: int, num_queries: int, first_key: int, num_keys: int, causal: bool, window: int | None
) -> Tensor | None:
    """Returns a boolean mask (queries, keys), True for visible keys; None if all are visible.

    `position` and `first_key` are sequence indices of the first query and key; keys at a distance
    of `window` or more are hidden.
    """
    distance = (position + torch.arange(num_queries))[:, None] - (
        first_key + torch.arange(num_keys)
    )
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance.abs() < window
    return None if bool(visible.all()) else visible


@lru_cache(maxsize=8)
def split_queries(
    segments: tuple[Segment, ...], causal: bool, window: int | None
) -> tuple[QueryBlock, ...]:
    """Returns, in order, the query blocks of a packed row that consists of `segments`."""
    return tuple(block for segment in segments for block in _split_segment(segment, causal, window))


def _split_segment(segment: Segment, causal: bool, window: int | None) -> Sequence[QueryBlock]:
    blocks = []
    num_tokens = segment.stop - segment.start
    length = segment.position + num_tokens
    for offset in range(0, num_tokens, QUERIES):
        num_queries = min(QUERIES, num_tokens - offset)
        position = segment.position + offset
        first = 0 if window is None else max(0, position - window + 1)
        last = position + num_queries
        if not causal:
            last = length if window is None else min(length, last + window - 1)
        if causal and window is None:  # only the last keys follow some query
            visible = create_visibility_mask(0, num_queries, 0, num_queries, causal, None)
        else:
            visible = create_visibility_mask(
                position, num_queries, first, last - first, causal, window
            )
        mask = (
            None if visible is None else torch.zeros(visible.shape).masked_fill(~visible, -math.inf)
        )
        keys = _clip((*segment.past, (segment.start, segment.stop)), first, last)
        start = segment.start + offset
        blocks.append(QueryBlock(start, start + num_queries, keys, mask))
    return blocks


def _clip(spans: Sequence[Range], first: int, last: int) -> tuple[Range, ...]:
    """Returns the packed ranges of tokens [`first`, `last`) of a sequence at ranges `spans`."""
    clipped, position = [], 0
    for start, stop in spans:
        low, high = max(first - position, 0), min(last - position, stop - start)
        if low < high:
            clipped.append((start + low, start + high))
        position += stop - start
    return tuple(clipped)


class BlockedAttention(torch.autograd.Function):
    """Attention of a packed row, one block of queries at a time.

    Queries are (heads, tokens, head_dim), keys (key heads, tokens, head_dim), values (key heads,
    tokens, value_dim); the output is (tokens, heads, value_dim).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Sequence[QueryBlock],
        scale: float,
        dropout: float,
        cap: float | None = None,
    ) -> Tensor:
        """Returns the attention output (tokens, heads, value_dim); `cap` is the softcap."""
        heads, tokens, _ = query.shape
        groups = len(key)
        output = query.new_empty(tokens, heads, value.shape[-1])
        saved: list[Tensor] = []
        for block in blocks:
            scores = _scores(query, key, block, scale, cap)
            seen = probabilities = _probabilities(scores, block, query.dtype)
            if dropout:
                keep = dropout_mask(seen, dropout)
                seen = probabilities * keep
                saved.append(keep)
            if dropout or block.width <= MAX_SAVED_KEYS:
                saved.append(probabilities)
            block_output = torch.bmm(seen, _rows(value, block.keys))
            _ungroup_heads(output[block.start : block.stop], block_output, groups)
        ctx.save_for_backward(query, key, value, *saved)
        ctx.blocks, ctx.scale, ctx.dropout, ctx.cap = blocks, scale, dropout, cap
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of queries, keys and values."""
        query, key, value, *rest = ctx.saved_tensors
        saved = iter(rest)
        heads, tokens, width = query.shape
        groups = len(key)
        of_query = query.new_empty(tokens, heads, width)
        of_key, of_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
        for block in ctx.blocks:
            keep = next(saved) if ctx.dropout else None
            is_saved = ctx.dropout or block.width <= MAX_SAVED_KEYS
            slope = None
            if ctx.cap or not is_saved:
                scores = _scores(query, key, block, ctx.scale, ctx.cap)
                slope = slope_of_cap(scores, ctx.cap, query.dtype) if ctx.cap else None
            p = next(saved) if is_saved else _probabilities(scores, block, query.dtype)
            of_output = _group_heads(gradient[block.start : block.stop], groups)
            seen = p if keep is None else p * keep
            _add(of_value, block.keys, seen.transpose(1, 2), of_output)
            grad_probs = torch.bmm(of_output, _rows(value, block.keys).transpose(1, 2))
            of_p = grad_probs if keep is None else grad_probs.mul_(keep)
            of_scores = softmax_backward(of_p, p, -1, p.dtype)
            of_scores = of_scores.mul_(ctx.scale)
            if slope is not None:
                of_scores.mul_(slope)
            of_block = torch.bmm(of_scores, _rows(key, block.keys))
            _ungroup_heads(of_query[block.start : block.stop], of_block, groups)
            _add(of_key, block.keys, of_scores.transpose(1, 2), _queries(query, block, groups))
        return of_query.transpose(0, 1), of_key, of_value, None, None, None, None


def _scores(
    query: Tensor, key: Tensor, block: QueryBlock, scale: float, cap: float | None
) -> Tensor:
    """Returns unmasked scores (key heads, heads per key head * queries, keys), float32 or wider."""
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    queries = _queries(query, block, len(key)).to(compute_dtype)
    keys = _rows(key, block.keys).to(compute_dtype)
    return cap_scores(torch.bmm(queries, keys.transpose(1, 2)).mul_(scale), cap)


def _probabilities(scores: Tensor, block: QueryBlock, dtype: torch.dtype) -> Tensor:
    """Returns the softmax of `scores` in `dtype`, after adding the mask of `block` in place."""
    if block.mask is not None:
        num_queries = block.stop - block.start
        last = scores.view(len(scores), -1, num_queries, block.width)[..., -block.mask.shape[1] :]
        last.add_(block.mask)
    return scores.softmax(-1).to(dtype)


def cap_scores(scores: Tensor, cap: float | None) -> Tensor:
    """Compute cap · tanh(scores / cap) in place, unless `cap` is None; returns `scores`."""
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def slope_of_cap(capped: Tensor, cap: float, dtype: torch.dtype) -> Tensor:
    """Returns the softcap's derivative 1 − (S/c)² in `dtype`, for softcapped scores S."""
    return 1 - (capped / cap).square_().to(dtype)


def _queries(query: Tensor, block: QueryBlock, groups: int) -> Tensor:
    """Returns the queries of a block, (key heads, heads per key head * queries, head_dim)."""
    return query[:, block.start : block.stop].reshape(groups, -1, query.shape[-1])


def _rows(states: Tensor, spans: Sequence[Range]) -> Tensor:
    """Returns the keys or values of a block, (key heads, keys, head_dim)."""
    if len(spans) == 1:
        return states[:, spans[0][0] : spans[0][1]]
    return torch.cat([states[:, start:stop] for start, stop in spans], dim=1)


def _add(total: Tensor, spans: Sequence[Range], left: Tensor, right: Tensor) -> None:
    if len(spans) == 1:
        total[:, spans[0][0] : spans[0][1]].baddbmm_(left, right)
        return
    product, offset = torch.bmm(left, right), 0
    for start, stop in spans:
        total[:, start:stop] += product[:, offset : offset + stop - start]
        offset += stop - start


def _group_heads(states: Tensor, groups: int) -> Tensor:
    """Reshape (queries, heads, dim) to (`groups` key heads, heads per key head * queries, dim)."""
    count, heads, width = states.shape
    return (
        states.reshape(count, groups, heads // groups, width)
        .permute(1, 2, 0, 3)
        .reshape(groups, -1, width)
    )


def _ungroup_heads(target: Tensor, states: Tensor, groups: int) -> None:
    """Write `states`, shaped as by `_group_heads`, to `target` (queries, heads, dim)."""
    count, heads, width = target.shape
    ungrouped = states.view(groups, heads // groups, count, width).permute(2, 0, 1, 3)
    target.view(count, groups, heads // groups, width).copy_(ungrouped)
