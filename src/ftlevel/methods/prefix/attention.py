"""Attention with a prefix: each query also sees P learned keys and values, whatever its position.

    out = softmax([q Kₚᵀ, q Kᵀ + bias] · scale) · [Vₚ; V]

(Li & Liang, 2021, section 4.2, where Kₚ and Vₚ are the activations of positions in front.) They
stand in front along the key axis, inside the attention only: hidden states, positions, labels and
the cache keep their lengths. They have no position: rotary keys are used as they are learned,
relative biases are zero, and neither causal nor sliding masks hide them.

Most families compute attention by a function that transformers looks up by name, which is where
ours comes in. Two compute it themselves; what they do is written out here once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ftlevel.models.upstream.architectures import eager_attention_of

ATTENTION = "ftlevel_prefix"
EAGER_ATTENTION = "ftlevel_prefix_eager"
"""Names of our functions in transformers' `AttentionInterface`."""
WITH_PREFIX = {"sdpa": ATTENTION, "eager": EAGER_ATTENTION}
"""The attention that a model has → ours, which computes the same behind a prefix."""

Prefix = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each (1, kv_heads, P, head_dim)."""


def register_attention() -> None:
    """Make our functions known to transformers, each with the masks of what it stands in for."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    AttentionInterface.register(EAGER_ATTENTION, attend_eagerly)
    AttentionMaskInterface.register(EAGER_ATTENTION, eager_mask)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix: Prefix | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute scaled dot-product attention over `prefix` and the keys.

    Args:
        module: the attention, for the number of its groups.
        query: (batch, heads, queries, head_dim), as rotated as it will be.
        key: (batch, kv_heads, keys, head_dim), the cache's included.
        value: likewise.
        attention_mask: (batch, 1, queries, keys), true or 0 where a key is seen; None where all
            are, or all that are not in the future.
        prefix: learned keys and values; None leaves plain attention.
        position_bias: (1, heads, queries, keys), T5's.
        kwargs: what the model passes on.

    Returns:
        (batch, queries, heads, head_dim), and None in place of the weights.
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
        # As many queries in front as keys: the causal triangle, and the kernel that needs no mask,
        # stay right. Their outputs are dropped.
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
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix: Prefix | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention over `prefix` and the keys as the model's own eager function does.

    Args:
        module: the attention.
        query: as in `attend`, and so are `key`, `value`, `prefix` and `position_bias`.
        key: see there.
        value: see there.
        attention_mask: (batch, 1, queries, keys), what is added to the scores; None where all keys
            are seen.
        prefix: see there.
        position_bias: see there.
        kwargs: what the model passes on.

    Returns:
        (batch, queries, heads, head_dim), and the weights: (batch, heads, queries, P + keys).
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
    output: tuple[torch.Tensor, torch.Tensor] = attend_plainly(
        module, query, key, value, attention_mask, **kwargs
    )
    return output


def _behind(
    prefix: Prefix, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values with those of the prefix in front of them, in every row."""
    key, value = (
        torch.cat([extra.to(states.dtype).expand(len(states), -1, -1, -1), states], dim=2)
        for extra, states in zip(prefix, (key, value), strict=True)
    )
    return key, value


def attend_gpt_neo(
    module: Any,
    prefix: Prefix,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    layer_past: Any = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `GPTNeoSelfAttention.forward` does (transformers 5.24), with `prefix`.

    Unscaled scores in float32; the module's buffer `bias` is its causal or local mask.
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
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    output_attentions: bool = False,
    query_states: torch.Tensor | None = None,
    relative_pos: torch.Tensor | None = None,
    rel_embeddings: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Do what `DisentangledSelfAttention.forward` does (transformers 5.24), with `prefix`.

    Prefix keys have a content score only: content-to-position and position-to-content need a
    distance, which they do not have (He et al., 2021, DeBERTa, equation 2).
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
OWN_ATTENTION: dict[str, Callable[..., Any]] = {
    f"{_MODELS}.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": attend_gpt_neo,
    f"{_MODELS}.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention": attend_deberta_v2,
}
"""Attentions that do not ask `AttentionInterface`, by their full class names."""


def own_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that computes `module` with a prefix, if it does not ask for one."""
    return OWN_ATTENTION.get(f"{type(module).__module__}.{type(module).__qualname__}")
