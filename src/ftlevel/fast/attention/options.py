"""Attention whose scores are capped, written out: SDPA has no cap.

What an attention is asked to compute of a row.
"""

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
    """Attend as SDPA does, with capped scores.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, key heads, keys, head_dim); each serves heads / key heads queries in a row.
        value: as `key`.
        mask: (batch or 1, 1, queries, keys), True or 0 for what is seen; None where causality alone
            decides.
        dropout: of the probabilities.
        scale: of the scores.
        cap: what they are capped at.
        causal: whether a query sees only what is before it, where there is no mask; one query alone
            is the last token and sees every key.

    Returns:
        (batch, queries, heads, head_dim), and None for the probabilities.
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
    """One attention's part of a model.

    Attributes:
        causal: whether a token sees only itself and what is before it.
        window: a token sees fewer than this many tokens to each side, itself included; None for
            all.
        scale: of the scores.
        dropout: of the probabilities.
        cap: what scores are capped at (Gemma 2); None for nothing.
    """

    causal: bool = True
    window: int | None = None
    scale: float = 1.0
    dropout: float = 0.0
    cap: float | None = None
