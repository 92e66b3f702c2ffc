"""Attention of one new token a row over what is kept of the row, under `AttentionInterface`.

SDPA with a mask is given keys and values once for every head that they serve, a copy of all that is
kept for each token that is written. Here the heads that share keys are the rows of one product.
Whatever has more than one new token goes through SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ftlevel_one_token"
"""What the attention is called in `set_attn_implementation`."""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def register() -> None:
    """Make the attention known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as SDPA does.

    Args:
        module: the attention that asks.
        query: (batch, heads, new, head_dim).
        key: (batch, key heads, seq, head_dim); each serves heads / key heads queries in a row.
        value: as `key`.
        attention_mask: (batch, 1, new, seq), True or 0 for what is seen; None sees all.
        dropout: of the probabilities.
        scaling: of the scores; the default is 1 / sqrt(head_dim).
        others: what other implementations take.

    Returns:
        (batch, new, heads, head_dim), and None for the probabilities.
    """
    rows, heads, new, width = query.shape
    if new != 1 or dropout or any(others.get(name) is not None for name in _UNSUPPORTED):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **others
        )
    scale = width**-0.5 if scaling is None else scaling
    groups = key.shape[1]
    scores = torch.matmul(
        (query * scale).view(rows, groups, heads // groups, width), key.transpose(2, 3)
    )
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[2]]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    attended = torch.matmul(shares, value)
    return attended.reshape(rows, 1, heads, value.shape[-1]), None
