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

Pair = tuple[Tensor, Tensor]

QUERIES = 128
"""Queries per block; the fastest of 64, 128 and 256 in bfloat16."""

MAX_SAVED_KEYS = 256
"""Maximum keys of a block whose probabilities are saved for the backward pass."""


@dataclass(frozen=True)
class QueryBlock:
    """A block of queries, and the keys that at least one of these queries sees.

    Attributes:
        start, stop: range of the queries in the packed row.
        first, last: range of the keys in the key row.
        mask: added to the scores of the last keys (-inf hides a key); None if all are visible.
    """

    start: int
    stop: int
    first: int
    last: int
    mask: Tensor | None

    @property
    def width(self) -> int:
        """Number of keys."""
        return self.last - self.first


class QueryBlocks(tuple[QueryBlock, ...]):
    """Query blocks of a packed row, whose key row has `Segment.past` before each segment."""

    source: Tensor | None = None  # packed indices of the key row; None if it is the packed row

    def gather(self, states: Tensor) -> Tensor:
        """Returns keys or values (key heads, tokens, dim) in the order of the key row."""
        return states if self.source is None else states.index_select(1, self.source)

    def scatter(self, gradient: Tensor, states: Tensor) -> Tensor:
        """Returns the gradient of `states` from that of `gather(states)`."""
        if self.source is None:
            return gradient
        return torch.zeros_like(states).index_add_(1, self.source, gradient)


@lru_cache(maxsize=512)
def create_visibility_mask(
    position: int, num_queries: int, num_keys: int, causal: bool, window: int | None
) -> Tensor | None:
    """Returns a boolean mask (queries, keys), True for visible keys; None if all are visible.

    `position` is the first query's, counted from the first key; keys `window` away are hidden.
    """
    distance = (position + torch.arange(num_queries))[:, None] - torch.arange(num_keys)
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance.abs() < window
    return None if bool(visible.all()) else visible


@lru_cache(maxsize=8)
def split_queries(segments: tuple[Segment, ...], causal: bool, window: int | None) -> QueryBlocks:
    """Returns the query blocks of a packed row that consists of `segments`."""
    if not any(segment.past for segment in segments):
        return QueryBlocks(b for s in segments for b in _split_segment(s, s.start, causal, window))
    blocks, spans, offset = list[QueryBlock](), list[Range](), 0
    for segment in segments:
        blocks += _split_segment(segment, offset, causal, window)
        spans += [*segment.past, (segment.start, segment.stop)]
        offset += segment.position + segment.stop - segment.start
    result = QueryBlocks(blocks)
    result.source = torch.cat([torch.arange(*span) for span in spans])
    return result


def _split_segment(
    segment: Segment, first_key: int, causal: bool, window: int | None
) -> Sequence[QueryBlock]:
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
        # Without a window, only the last keys follow some query.
        masked = position if causal and window is None else first
        at, num_keys = position - masked, last - masked
        visible = create_visibility_mask(at, num_queries, num_keys, causal, window)
        mask = None
        if visible is not None:
            mask = torch.zeros(visible.shape).masked_fill(~visible, -math.inf)[:, None]
        start = segment.start + offset
        keys = first_key + first, first_key + last
        blocks.append(QueryBlock(start, start + num_queries, *keys, mask))
    return blocks


class BlockedAttention(torch.autograd.Function):
    """Attention of a packed row, one block of queries at a time.

    Queries are (heads, tokens, head_dim), keys (key heads, tokens, head_dim), values (key heads,
    tokens, value_dim); the output is (tokens, heads, value_dim). Inside, the rows of a block are
    consecutive: (key heads, tokens * heads per key head, head_dim).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: QueryBlocks,
        scale: float,
        dropout: float,
        cap: float | None = None,
    ) -> Tensor:
        """Returns the attention output (tokens, heads, value_dim); `cap` is the softcap."""
        groups, ratio = len(key), len(query) // len(key)
        queries = _group_heads(query.transpose(0, 1), groups)
        exact = _exact(queries, blocks.gather(key), scale)
        values = blocks.gather(value)
        outputs = queries.new_empty(*queries.shape[:2], value.shape[-1])
        saved: list[Tensor] = []
        for block in blocks:
            seen = p = _probabilities(_scores(exact, block, ratio, cap), block, query.dtype)
            if dropout:
                keep = dropout_mask(p, dropout)
                seen = p * keep
                saved.append(keep)
            if dropout or block.width <= MAX_SAVED_KEYS:
                saved.append(p)
            torch.bmm(seen, _keys(values, block), out=_rows(outputs, block, ratio))
        ctx.save_for_backward(queries, key, value, *saved)
        ctx.blocks, ctx.scale, ctx.dropout, ctx.cap = blocks, scale, dropout, cap
        return _ungroup_heads(outputs, len(query))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of queries, keys and values."""
        queries, key, value, *rest = ctx.saved_tensors
        blocks, saved = ctx.blocks, iter(rest)
        heads = gradient.shape[1]
        ratio = heads // len(key)
        keys, values = blocks.gather(key), blocks.gather(value)
        grad_outputs = _group_heads(gradient, len(key))
        grad_queries = queries.new_empty(queries.shape)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        exact: Pair | None = None
        for block in blocks:
            keep = next(saved) if ctx.dropout else None
            is_saved = ctx.dropout or block.width <= MAX_SAVED_KEYS
            slope = None
            if ctx.cap or not is_saved:
                exact = exact or _exact(queries, keys, ctx.scale)
                scores = _scores(exact, block, ratio, ctx.cap)
                slope = slope_of_cap(scores, ctx.cap, queries.dtype) if ctx.cap else None
            p = next(saved) if is_saved else _probabilities(scores, block, queries.dtype)
            grad_output = _rows(grad_outputs, block, ratio)
            seen = p if keep is None else p * keep
            _keys(grad_values, block).baddbmm_(seen.transpose(1, 2), grad_output)
            grad_probs = torch.bmm(grad_output, _keys(values, block).transpose(1, 2))
            grad_p = grad_probs if keep is None else grad_probs.mul_(keep)
            grad_scores = softmax_backward(grad_p, p, -1, p.dtype).mul_(ctx.scale)
            if slope is not None:
                grad_scores.mul_(slope)
            torch.bmm(grad_scores, _keys(keys, block), out=_rows(grad_queries, block, ratio))
            rows = _rows(queries, block, ratio)
            _keys(grad_keys, block).baddbmm_(grad_scores.transpose(1, 2), rows)
        grad_query = _ungroup_heads(grad_queries, heads).transpose(0, 1)
        grad_key, grad_value = blocks.scatter(grad_keys, key), blocks.scatter(grad_values, value)
        return grad_query, grad_key, grad_value, None, None, None, None


def _exact(queries: Tensor, keys: Tensor, scale: float) -> Pair:
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return queries.to(dtype) * scale, keys.to(dtype)


def _scores(exact: Pair, block: QueryBlock, ratio: int, cap: float | None) -> Tensor:
    queries, keys = _rows(exact[0], block, ratio), _keys(exact[1], block)
    return cap_scores(torch.bmm(queries, keys.transpose(1, 2)), cap)


def _probabilities(scores: Tensor, block: QueryBlock, dtype: torch.dtype) -> Tensor:
    if block.mask is not None:
        by_query = scores.view(len(scores), block.stop - block.start, -1, block.width)
        by_query[..., -block.mask.shape[-1] :].add_(block.mask)
    return scores.softmax(-1).to(dtype)


def cap_scores(scores: Tensor, cap: float | None) -> Tensor:
    """Compute cap · tanh(scores / cap) in place, unless `cap` is None; returns `scores`."""
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def slope_of_cap(capped: Tensor, cap: float, dtype: torch.dtype) -> Tensor:
    """Returns the softcap's derivative 1 − (S/c)² in `dtype`, for softcapped scores S."""
    return 1 - (capped / cap).square_().to(dtype)


def _rows(states: Tensor, block: QueryBlock, ratio: int) -> Tensor:
    return states[:, block.start * ratio : block.stop * ratio]


def _keys(states: Tensor, block: QueryBlock) -> Tensor:
    return states[:, block.first : block.last]


def _group_heads(states: Tensor, groups: int) -> Tensor:
    """Reshape (tokens, heads, dim) to (`groups` key heads, tokens * heads per key head, dim)."""
    tokens, _, width = states.shape
    return states.reshape(tokens, groups, -1, width).transpose(0, 1).reshape(groups, -1, width)


def _ungroup_heads(states: Tensor, heads: int) -> Tensor:
    """Reshape the result of `_group_heads` to (tokens, `heads`, dim)."""
    groups, _, width = states.shape
    by_token = states.view(groups, -1, heads // groups, width).transpose(0, 1)
    return by_token.reshape(-1, heads, width)
