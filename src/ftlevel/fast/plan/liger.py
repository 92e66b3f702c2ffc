"""liger-kernel's fused norms, rotary embedding and activation on a CUDA GPU.

transformers' own switch puts them onto the model. The language head and the loss stay ours: they
are computed on supervised positions, where liger's would score every one.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice

FAMILIES = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "phi3"}
)
"""Model types whose norms, rotary embedding and activation liger-kernel has."""

OWN_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def uses_liger(config: TrainConfig, device: str, model_type: str) -> bool:
    """Return whether liger-kernel is there, serves the model, and is not switched off."""
    speed = config.speed
    return (
        device == "cuda"
        and speed.fast
        and speed.liger_kernel
        and model_type in FAMILIES
        and importlib.util.find_spec("liger_kernel") is not None
    )


def kernel_choices(config: TrainConfig, device: str, model_type: str) -> list[Choice]:
    """Return the line of the screen; none where torch's own kernels are used."""
    if not uses_liger(config, device, model_type):
        return []
    return [Choice("kernels", "liger-kernel", "norms, rotary embedding and activation; installed")]


def kernel_arguments(config: TrainConfig, device: str, model_type: str) -> dict[str, Any]:
    """Return what `TrainingArguments` is told."""
    if not uses_liger(config, device, model_type):
        return {}
    return {"use_liger_kernel": True, "liger_kernel_config": OWN_LOSS}
