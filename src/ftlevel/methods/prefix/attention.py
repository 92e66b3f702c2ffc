"""Attention with P learned key-value pairs that every query can attend to.

    out = softmax([q Kₚᵀ, q Kᵀ + bias] · scale) · [Vₚ; V]         Li & Liang, 2021, section 4.2

The prefix is prepended on the key axis inside the attention only, so hidden states, positions,
labels and the cache keep their lengths. It has no position: no rotary embedding, zero relative
bias, and no causal or sliding mask. It is added through transformers' `AttentionInterface`; GPT-Neo
and DeBERTa-v2 do not use that, so their attention is reimplemented here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftlevel.models.upstream.architectures import eager_attention_of

ATTENTION = "ftlevel_prefix"
EAGER_ATTENTION = "ftlevel_prefix_eager"
"""Names of ftlevel's functions in transformers' `AttentionInterface`."""
WITH_PREFIX = {"sdpa": ATTENTION, "eager": EAGER_ATTENTION}
"""Attention implementation -> ftlevel's equivalent with a prefix."""

Prefix = tuple[Tensor, Tensor]
"""Keys and values, each `(1, kv_heads, P, head_dim)`."""


def register_attention() -> None:
    """Register the attention functions in transformers, with the masks of those they replace."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    AttentionInterface.register(EAGER_ATTENTION, attend_eagerly)
    AttentionMaskInterface.register(EAGER_ATTENTION, eager_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix: Prefix | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention over `prefix` and the keys.

    Args:
        module: the attention module, for its number of key-value groups.
        query: `(batch, heads, queries, head_dim)`, after rotary embedding.
        key: `(batch, kv_heads, keys, head_dim)`, including the cache.
        value: same shape as `key`.
        attention_mask: `(batch, 1, queries, keys)`, boolean or additive; None is causal or full.
        prefix: learned keys and values; None computes plain attention.
        position_bias: `(1, heads, queries, keys)` of T5.
        kwargs: arguments of transformers' function.

    Returns:
        `(batch, queries, heads, head_dim)`, and None for the weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, position_bias=position_bias, **kwargs
        )
    length = prefix[0].shape[2]
    key, value = _behind(prefix, key, value)
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    in_front = 0
    if attention_mask is not None:
        attention_mask = functional.pad(
            attention_mask, (length, 0), value=attention_mask.dtype == torch.bool
        )
    elif is_causal and query.shape[2] > 1:
        # Prepend as many queries as keys, so the maskless causal kernel stays correct.
        # Their outputs are dropped.
        in_front = length
        query = functional.pad(query, (0, 0, length, 0))
    if position_bias is not None:
        position_bias = functional.pad(position_bias, (length, 0, in_front, 0))
    output, weights = sdpa_attention_forward(
        module, query, key, value, attention_mask, position_bias=position_bias, **kwargs
    )
    return output[:, in_front:], weights


def attend_eagerly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix: Prefix | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention over `prefix` and the keys with the model's own eager function.

    Arguments are as for `attend`, but `attention_mask` is additive. Returns
    `(batch, queries, heads, head_dim)` and weights `(batch, heads, queries, P + keys)`.
    """
    if prefix is not None:
        length = prefix[0].shape[2]
        key, value = _behind(prefix, key, value)
        if attention_mask is not None:
            attention_mask = functional.pad(attention_mask, (length, 0))
        if position_bias is not None:
            position_bias = functional.pad(position_bias, (length, 0))
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    attend_plainly = eager_attention_of(module)
    return attend_plainly(module, query, key, value, attention_mask, **kwargs)


def _behind(prefix: Prefix, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values with the prefix prepended in every row."""
    key, value = (
        torch.cat([extra.to(states.dtype).expand(len(states), -1, -1, -1), states], dim=2)
        for extra, states in zip(prefix, (key, value), strict=True)
    )
    return key, value


def attend_gpt_neo(
    module: Any,
    prefix: Prefix,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    layer_past: Any = None,
    **_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Reimplement `GPTNeoSelfAttention.forward` (transformers 5.24) with `prefix`.

    Logits are unscaled and in float32; the buffer `bias` is the causal or local mask.
    """
    shape = (*hidden_states.shape[:-1], module.num_heads, module.head_dim)
    query, key, value = (
        linear(hidden_states).view(shape).transpose(1, 2)
        for linear in (module.q_proj, module.k_proj, module.v_proj)
    )
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_id)
    queries, keys = query.shape[-2], key.shape[-2]
    scores = query.float() @ key.float().transpose(-1, -2)
    seen = module.bias[:, :, keys - queries : keys, :keys]
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if attention_mask is not None:
        scores = scores + attention_mask
    on_prefix = query.float() @ prefix[0].float().transpose(-1, -2)
    weights = torch.cat([on_prefix, scores], dim=-1).softmax(-1).to(value.dtype)
    weights = module.attn_dropout(weights)
    values = torch.cat([prefix[1].to(value.dtype).expand(len(value), -1, -1, -1), value], dim=2)
    output = (weights @ values).transpose(1, 2).flatten(2)
    return module.resid_dropout(module.out_proj(output)), weights


def attend_deberta_v2(
    module: Any,
    prefix: Prefix,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Reimplement `DisentangledSelfAttention.forward` (transformers 5.24) with `prefix`.

    Prefix keys have no position, so only the content-to-content term applies (He et al., 2021,
    DeBERTa, equation 2).
    """
    heads = module.num_attention_heads
    source = hidden_states if query_states is None else query_states
    query = module.transpose_for_scores(module.query_proj(source), heads)
    key = module.transpose_for_scores(module.key_proj(hidden_states), heads)
    value = module.transpose_for_scores(module.value_proj(hidden_states), heads)
    terms = 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)
    scale = math.sqrt(query.shape[-1] * terms)
    scores = query @ (key.transpose(-1, -2) / scale)
    if module.relative_attention:
        scores = scores + module.disentangled_attention_bias(
            query, key, relative_pos, module.pos_dropout(rel_embeddings), terms
        )
    batch = len(hidden_states)
    scores, query, value = (
        states.view(batch, heads, *states.shape[1:]) for states in (scores, query, value)
    )
    scores = scores.masked_fill(~attention_mask.bool(), torch.finfo(query.dtype).min)
    on_prefix = query @ (prefix[0].to(query.dtype).transpose(-1, -2) / scale)
    weights = module.dropout(torch.cat([on_prefix, scores], dim=-1).softmax(-1))
    values = torch.cat([prefix[1].to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)
    output = (weights @ values).transpose(1, 2).flatten(2)
    return output, weights if output_attentions else None


_MODELS = "transformers.models"
CUSTOM_ATTENTION: dict[str, Callable[..., Any]] = {
    f"{_MODELS}.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": attend_gpt_neo,
    f"{_MODELS}.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention": attend_deberta_v2,
}
"""Attention classes that do not use `AttentionInterface`, by full class name."""


def custom_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Return the reimplementation for `module`, or None if it uses `AttentionInterface`."""
    return CUSTOM_ATTENTION.get(f"{type(module).__module__}.{type(module).__qualname__}")
