"""Attention in which each packed sequence sees only itself, for `AttentionInterface`.

Without a current layout it computes SDPA with SDPA's masks, e.g. in generation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ftlevel.fast.attention.blocked import BlockedAttention, build_visibility_mask, split_queries
from ftlevel.fast.attention.gpu import (
    AttentionOptions,
    FlashKernel,
    attend_capped,
    attend_padded,
    attend_varlen,
    supports_attention,
)
from ftlevel.fast.attention.short import ShortAttention, are_short, batch_sequences
from ftlevel.fast.layers.recompute import worker_generator
from ftlevel.fast.packing import PackedLayout, Segment, UnsupportedModelError, current_layout
from ftlevel.fast.prefixes import current_prefix

NAME = "ftlevel_packed"
"""Name of the attention for `set_attn_implementation`."""

MAX_BLOCKED = 1024
"""Maximum sequence length for blocks; longer sequences use SDPA. On Zen 4, blocks take a third
of its time at 512 tokens and the same time at 2,048.
"""

_UNSUPPORTED = ("s_aux", "position_bias")


def register(kernel: FlashKernel | None = None) -> None:
    """Register the attention with transformers; `kernel` replaces torch's on a GPU."""
    AttentionInterface.register(NAME, partial(attend, kernel=kernel))
    AttentionMaskInterface.register(NAME, build_mask)


def build_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Build SDPA's mask, or None for a packed row."""
    return sdpa_mask(*args, **kwargs) if current_layout() is None else None


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
    kernel: FlashKernel | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention within the sequences of the current layout.

    `query` is (1, heads, tokens, head_dim), `key` and `value` are (1, key heads, tokens, head_dim).
    `scaling` defaults to 1 / sqrt(head_dim), `is_causal` to the module's. `sliding_window` includes
    the token itself.

    Returns:
        (1, tokens, heads, head_dim), and None for the attention weights.

    Raises:
        NotServedError: the model uses an unsupported option.
    """
    layout = current_layout()
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None and softcap:
        return attend_capped(query, key, value, attention_mask, dropout, scale, softcap, causal)
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
    compute = (
        torch.get_autocast_dtype(query.device.type)
        if torch.is_autocast_enabled(query.device.type)
        else value.dtype
    )
    states = [part.squeeze(0).to(compute) for part in (query, key, value)]
    options = AttentionOptions(causal, sliding_window, scale, dropout, softcap or None)
    attended = _by_sequence(layout, states, options, kernel)
    row_states = attended[layout.before :] if layout.before else attended
    return row_states[None], None


def _by_sequence(
    layout: PackedLayout,
    states: list[Tensor],
    options: AttentionOptions,
    kernel: FlashKernel | None,
) -> Tensor:
    """Return (tokens, heads, head_dim): by one kernel on a GPU, by blocks or SDPA on a CPU."""
    if supports_attention(states[0], options, kernel):
        return attend_varlen(states, layout.segments, options, kernel)
    if states[0].device.type != "cpu":
        return attend_padded(states, layout.segments, options)
    is_short = all(s.stop - s.start <= MAX_BLOCKED for s in layout.segments)
    is_tree = any(segment.past for segment in layout.segments)
    # SDPA would use the generator of the process.
    draws_itself = options.dropout > 0 and worker_generator() is not None
    scaling = (options.scale, options.dropout, options.cap)
    if are_short(layout.segments):
        batches = batch_sequences(layout.segments, options.causal, options.window)
        with torch.autocast("cpu", enabled=False):
            return ShortAttention.apply(  # type: ignore[no-untyped-call]
                *states, batches, *scaling
            )
    if is_short or is_tree or draws_itself or options.cap:
        blocks = split_queries(layout.segments, options.causal, options.window)
        with torch.autocast("cpu", enabled=False):
            return BlockedAttention.apply(  # type: ignore[no-untyped-call]
                *states, blocks, *scaling
            )
    outputs = [_by_sdpa(segment, states, options) for segment in layout.segments]
    return torch.cat(outputs, dim=1).transpose(0, 1).contiguous()


def _by_sdpa(segment: Segment, states: list[Tensor], options: AttentionOptions) -> Tensor:
    """Return (heads, tokens of the segment, head_dim) for a segment without a past."""
    query, key, value = (part[:, segment.start : segment.stop] for part in states)
    length = key.shape[1]
    plain = options.window is None or options.window > length
    mask = (
        None
        if plain
        else build_visibility_mask(0, length, 0, length, options.causal, options.window)
    )
    output = functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        dropout_p=options.dropout,
        is_causal=options.causal and plain,
        scale=options.scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return output[0]
