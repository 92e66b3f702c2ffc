"""Which experts can be packed in 4 bits; imports no bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BLOCK = 64
"""Weights that share a scale."""
NAMES = ("gate_up_proj", "down_proj")
"""The tensors of a module of experts, (experts, out, in)."""

_KIND = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def can_pack(module: Any) -> bool:
    """Whether `module` holds experts that `forward` multiplies: gated, without biases.

    Each expert's weights must fill blocks of their own, which share a scale.
    """
    held: dict[str, Any] = getattr(module, "_parameters", {})
    own = [held[name] for name in NAMES if held.get(name) is not None]
    if [tensor.dim() for tensor in own] != [3, 3]:
        return False
    kind = [getattr(module, name, None) for name in _KIND]  # None where its forward is its own
    plain = kind == [True, False, False, False]
    return plain and all(tensor[0].numel() % BLOCK == 0 for tensor in own)


def packable_experts(model: Any) -> Iterator[str]:
    """Yield the names of the experts' tensors of `model` that are packed in 4 bits."""
    for owner, module in model.named_modules():
        if can_pack(module):
            yield from (f"{owner}.{name}" for name in NAMES)
