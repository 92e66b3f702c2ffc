"""Attention in which each packed sequence sees only itself, for `AttentionInterface`.

Without a current layout (e.g. in generation) it is SDPA with SDPA's masks. Sequences of up to 64
tokens are padded and computed in batches, with the formulas of `blocked_attention`: in bfloat16,
batches take half the time of blocks at 20 to 32 tokens and four fifths at 64. In a row that begins
with longer sequences, as micro-batches do, only these are computed in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ftlevel.fast.blocked_attention import (
    BlockedAttention,
    cap_scores,
    create_visibility_mask,
    slope_of_cap,
    split_queries,
)
from ftlevel.fast.gpu_attention import (
    AttentionOptions,
    padded_attention,
    softcapped_attention,
    supports_varlen,
    varlen_attention,
)
from ftlevel.fast.packing import PackedLayout, Segment, UnsupportedModelError, current_layout
from ftlevel.fast.prefixes import current_prefix
from ftlevel.fast.recompute import dropout_mask, worker_generator
from ftlevel.models.upstream.architectures import create_sdpa_mask
from ftlevel.models.upstream.tensors import is_on_gpu, softmax_backward

MAX_SHORT = 64
"""Maximum tokens of a short sequence."""

MAX_PADDING = 1.25
"""Maximum positions of a batch per token."""


@dataclass(frozen=True)
class Batch:
    """Consecutive sequences of a packed row, padded to the longest.

    Attributes:
        start, stop: range of the sequences in the row.
        source: (count · longest,) token index of each padded position.
        positions: (stop - start,) padded position of each token.
        mask: (count or 1, 1, longest, longest), added to the scores; None for no mask.
    """

    start: int
    stop: int
    count: int
    longest: int
    source: Tensor
    positions: Tensor
    mask: Tensor | None


def count_long(segments: Sequence[Segment]) -> int:
    """Returns the number of segments before the last ones that are whole and short sequences."""
    is_long = (bool(s.past) or s.stop - s.start > MAX_SHORT for s in segments)
    return max((number for number, long in enumerate(is_long, 1) if long), default=0)


@lru_cache(maxsize=8)
def batch_sequences(
    segments: tuple[Segment, ...], causal: bool, window: int | None
) -> tuple[Batch, ...]:
    """Returns padded batches of short sequences in row order; arguments as in `split_queries`.

    Their positions are counted from the start of the first sequence.
    """
    return tuple(_pad(group, segments[0].start, causal, window) for group in _group(segments))


def _group(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    group: list[Segment] = []
    for segment in segments:
        longest = max(s.stop - s.start for s in (*group, segment))
        tokens = segment.stop - (group[0].start if group else segment.start)
        if group and longest * (len(group) + 1) > MAX_PADDING * tokens:
            yield group
            group = []
        group.append(segment)
    yield group


def _pad(group: Sequence[Segment], first: int, causal: bool, window: int | None) -> Batch:
    lengths = torch.tensor([s.stop - s.start for s in group])
    num_sequences, longest = len(group), int(lengths.max())
    is_token = torch.arange(longest) < lengths[:, None]
    positions = is_token.flatten().nonzero()[:, 0]
    source = (is_token.flatten().cumsum(0) - 1).clamp(min=0)
    seen = create_visibility_mask(0, longest, longest, causal, window)
    mask = None
    if not bool(is_token.all()) or seen is not None:
        visible = torch.ones(longest, longest, dtype=torch.bool) if seen is None else seen
        hidden = ~(visible & is_token[:, None, :])[:, None]
        # A padded query must see some key, or its softmax is NaN.
        hidden &= is_token[:, None, :, None]
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)
    start, stop = group[0].start - first, group[-1].stop - first
    return Batch(start, stop, num_sequences, longest, source, positions, mask)


class ShortAttention(torch.autograd.Function):
    """Attention of a packed row of short sequences; shapes as in `BlockedAttention`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batches: Sequence[Batch],
        scale: float,
        dropout: float,
        cap: float | None = None,
    ) -> Tensor:
        """Returns the attention output (tokens, heads, value_dim); `cap` is the softcap."""
        groups, outputs = len(key), []
        saved: list[Tensor] = []
        for batch in batches:
            q, k, v = (
                _to_batch(part.transpose(0, 1), batch, groups) for part in (query, key, value)
            )
            p = seen = _probabilities(_scores(q, k, scale, cap), batch, q.dtype)
            saved += [q, k, v, p]
            if dropout:
                keep = dropout_mask(p, dropout)
                saved.append(keep)
                seen = p * keep
            outputs.append(_from_batch(torch.bmm(seen, v), batch, groups))
        ctx.save_for_backward(*saved)
        ctx.arguments = batches, scale, dropout, groups, cap
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of queries, keys and values."""
        batches, scale, dropout, groups, cap = ctx.arguments
        saved, all_gradients = iter(ctx.saved_tensors), []
        for batch in batches:
            q, k, v, p = (next(saved) for _ in range(4))
            keep = next(saved) if dropout else None
            of_output = _to_batch_with_zeros(gradient, batch, groups)
            grad_probs = torch.bmm(of_output, v.transpose(1, 2))
            of_p = grad_probs if keep is None else grad_probs.mul_(keep)
            of_scores = softmax_backward(of_p, p, -1, p.dtype).mul_(scale)
            if cap:
                of_scores.mul_(slope_of_cap(_scores(q, k, scale, cap), cap, p.dtype))
            block_gradients = (
                torch.bmm(of_scores, k),
                torch.bmm(of_scores.transpose(1, 2), q),
                torch.bmm((p if keep is None else p * keep).transpose(1, 2), of_output),
            )
            all_gradients.append([_from_batch(part, batch, groups) for part in block_gradients])
        merged = (torch.cat(column).transpose(0, 1) for column in zip(*all_gradients, strict=True))
        return (*merged, None, None, None, None)


def _scores(query: Tensor, key: Tensor, scale: float, cap: float | None) -> Tensor:
    """Returns unmasked scores (sequences · key heads, heads per key head · queries, keys)."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = torch.bmm(query.to(exact), key.to(exact).transpose(1, 2)).mul_(scale)
    return cap_scores(scores, cap)


def _probabilities(scores: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    if batch.mask is not None:
        scores.view(batch.count, -1, batch.longest, batch.longest).add_(batch.mask)
    return scores.softmax(-1).to(dtype)


def _to_batch(states: Tensor, batch: Batch, groups: int) -> Tensor:
    """Pad (tokens, heads, dim) to (count · `groups` key heads, heads per key head · longest, …)."""
    return _split(states[batch.start : batch.stop].index_select(0, batch.source), batch, groups)


def _to_batch_with_zeros(states: Tensor, batch: Batch, groups: int) -> Tensor:
    """Reshape as `_to_batch`, with padding zeroed so that it adds nothing to gradients."""
    padded = states.new_zeros(batch.count * batch.longest, *states.shape[1:])
    padded.index_copy_(0, batch.positions, states[batch.start : batch.stop])
    return _split(padded, batch, groups)


def _split(padded: Tensor, batch: Batch, groups: int) -> Tensor:
    _, heads, width = padded.shape
    heads_by_group = padded.view(batch.count, batch.longest, groups, heads // groups, width)
    return heads_by_group.permute(0, 2, 3, 1, 4).reshape(batch.count * groups, -1, width)


def _from_batch(states: Tensor, batch: Batch, groups: int) -> Tensor:
    """Reshape the result of `_to_batch` back to (tokens, heads, dim)."""
    width = states.shape[-1]
    heads_by_token = states.view(batch.count, groups, -1, batch.longest, width).permute(
        0, 3, 1, 2, 4
    )
    return heads_by_token.reshape(batch.count * batch.longest, -1, width).index_select(
        0, batch.positions
    )


NAME = "ftlevel_packed"
"""Name of the attention for `set_attn_implementation`."""

MAX_BLOCKED = 1024
"""Maximum sequence length for blocks; longer sequences use SDPA. On Zen 4, blocks take a third
of its time at 512 tokens and the same time at 2,048.
"""

_UNSUPPORTED = ("s_aux", "position_bias")


def register() -> None:
    """Register the attention with transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, create_mask)


def create_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Returns SDPA's mask; None for a packed row, whose segments replace a mask."""
    return create_sdpa_mask(*args, **kwargs) if current_layout() is None else None


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Returns attention within the sequences of the current layout, and None for the weights.

    The output is (1, tokens, heads, head_dim), `query` is (1, heads, tokens, head_dim), `key` and
    `value` are (1, key heads, tokens, head_dim). `scaling` defaults to 1 / sqrt(head_dim),
    `is_causal` to the module's. `sliding_window` includes the token itself. Raises
    UnsupportedModelError if the model uses an unsupported option.
    """
    layout = current_layout()
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None and softcap:
        return softcapped_attention(
            query, key, value, attention_mask, dropout, scale, softcap, causal
        )
    if layout is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            is_causal=is_causal,
            sliding_window=sliding_window,
            **others,
        )
    for name in _UNSUPPORTED:
        if others.get(name) is not None:
            raise UnsupportedModelError(f"its attention has {name}")
    if not causal and any(segment.past for segment in layout.segments):
        raise UnsupportedModelError("its attention is not causal")
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == layout.tokens:
        raise UnsupportedModelError("its attention is over something else than the row's tokens")
    prefix = current_prefix()
    if prefix is not None:
        query, key, value = prefix.join(module, query, key, value)
    compute_dtype = (
        torch.get_autocast_dtype(query.device.type)
        if torch.is_autocast_enabled(query.device.type)
        else value.dtype
    )
    states = [part.squeeze(0).to(compute_dtype) for part in (query, key, value)]
    options = AttentionOptions(causal, sliding_window, scale, dropout, softcap or None)
    output = _by_sequence(layout, states, options)
    return output[len(output) - layout.tokens :][None], None


def _by_sequence(layout: PackedLayout, states: list[Tensor], options: AttentionOptions) -> Tensor:
    """Returns attention within the sequences, (tokens, heads, head_dim), by the fastest method.

    On a GPU, tokens of a shared prefix have no output.
    """
    if supports_varlen(states, options):
        return varlen_attention(states, layout.segments, options)
    if is_on_gpu(states[0]) or states[0].device.type != "cpu":
        return padded_attention(states, layout.segments, options)
    max_length = max(s.stop - s.start for s in layout.segments)
    is_short = max_length <= MAX_BLOCKED
    has_prefixes = any(segment.past for segment in layout.segments)
    is_unmasked = (
        not (options.dropout or options.cap) and (options.window or max_length) >= max_length
    )
    if layout.is_for_answers and is_unmasked and not has_prefixes and not layout.before:
        return _by_length(layout.segments, states, options)
    # SDPA would use the generator of the process.
    uses_worker_generator = options.dropout > 0 and worker_generator() is not None
    if is_short or has_prefixes or uses_worker_generator or options.cap:
        return _by_blocks(layout.segments, states, options)
    outputs = [_by_sdpa(segment, states, options) for segment in layout.segments]
    return torch.cat(outputs, dim=1).transpose(0, 1).contiguous()


def _by_blocks(
    segments: tuple[Segment, ...], states: list[Tensor], options: AttentionOptions
) -> Tensor:
    """Returns attention (tokens, heads, head_dim): short last sequences in batches, else blocks."""
    count, outputs = count_long(segments), list[Tensor]()
    end = segments[count - 1].stop if count else 0
    for sequences, tokens, function, split in (
        (segments[:count], slice(end), BlockedAttention, split_queries),
        (segments[count:], slice(end, None), ShortAttention, batch_sequences),
    ):
        if sequences:
            plan = split(sequences, options.causal, options.window)
            inputs = [part[:, tokens] for part in states]
            scaling = (options.scale, options.dropout, options.cap)
            with torch.autocast("cpu", enabled=False):
                outputs.append(function.apply(*inputs, plan, *scaling))  # type: ignore[no-untyped-call]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _by_length(
    segments: Sequence[Segment], states: list[Tensor], options: AttentionOptions
) -> Tensor:
    """Returns attention (tokens, heads, head_dim): one SDPA call per run of equally long segments.

    `states` are query, key and value. With segments of 15 tokens in bfloat16, this takes a third
    of the time of `ShortAttention`, whose softmax is in float32.
    """
    outputs = []
    for length, group in groupby(segments, lambda segment: segment.stop - segment.start):
        first, *others = group
        start, count = first.start, 1 + len(others)
        query, key, value = (
            part[:, start : start + count * length]
            .view(len(part), count, length, -1)
            .transpose(0, 1)
            for part in states
        )
        output = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=options.causal,
            scale=options.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _by_sdpa(segment: Segment, states: list[Tensor], options: AttentionOptions) -> Tensor:
    query, key, value = (part[:, segment.start : segment.stop] for part in states)
    length = key.shape[1]
    is_unmasked = options.window is None or options.window > length
    mask = (
        None
        if is_unmasked
        else create_visibility_mask(0, length, length, options.causal, options.window)
    )
    output = functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        dropout_p=options.dropout,
        is_causal=options.causal and is_unmasked,
        scale=options.scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return output[0]
