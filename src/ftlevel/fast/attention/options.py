"""Options of an attention layer, and attention with softcapped scores, which SDPA lacks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


def attend_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float,
    cap: float,
    causal: bool,
) -> tuple[torch.Tensor, None]:
    """Compute attention like SDPA, with softcapped scores.

    `query` is (batch, heads, queries, head_dim), `key` and `value` are (batch, key heads, keys,
    head_dim), `mask` is (batch or 1, 1, queries, keys), True or 0 where visible. `causal` applies
    without a mask; a single query is the last token and sees every key.

    Returns:
        (batch, queries, heads, head_dim), and None for the attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    exact = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query.to(exact), key.to(exact).transpose(2, 3)) * scale
    scores = cap * torch.tanh(scores / cap)
    queries, keys = scores.shape[2:]
    if mask is None and causal and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = mask[..., :keys]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(exact).min)
        else:
            scores = scores + mask
    shares = functional.dropout(scores.softmax(-1).to(value.dtype), dropout)
    return torch.matmul(shares, value).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class AttentionOptions:
    """Options of an attention layer.

    A token sees fewer than `window` tokens to each side, itself included. `cap` is the softcap of
    the scores (Gemma 2).
    """

    causal: bool = True
    window: int | None = None
    scale: float = 1.0
    dropout: float = 0.0
    cap: float | None = None
