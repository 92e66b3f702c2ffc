"""How many passes of a step are computed side by side, and why it is one where it could be more."""

from __future__ import annotations

import os
from typing import Any

import torch

from ftlevel.config import AdapterSpec, TrainConfig
from ftlevel.models.families import lookup_family
from ftlevel.speed.lanes import MOST_LANES

VIRTUAL_TOKENS = ("prefix", "prompt", "p-tuning")
"""Methods whose rows hold more than the text."""


def plan_lanes(config: TrainConfig, meta: Any, device: str) -> tuple[int, str]:
    """Return how many passes are computed at once, and the reason for the screen where it is one.

    See `speed.lanes` for what must hold.

    Args:
        config: the configuration.
        meta: the model on the meta device.
        device: torch device type.
    """
    asked, threads = config.speed.passes_at_once, torch.get_num_threads()
    if device != "cpu" or threads == 1 or asked == 1:
        return 1, ""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return 1, "each process has its own"
    reason = _writes_to_itself(config, meta)
    if not reason and (drops := find_random(config, meta, with_head=True)):
        reason = f"{drops} is drawn at random, in order"
    return (1, reason) if reason else (min(threads, MOST_LANES if asked == "auto" else asked), "")


def _writes_to_itself(config: TrainConfig, meta: Any) -> str:
    """Return what a forward pass changes in the model, or may; empty if nothing."""
    method, family = config.method, meta.config.model_type
    if method.kind == "full":
        return "full would hold a gradient for every weight and pass"
    if method.kind in VIRTUAL_TOKENS:
        return f"{method.kind} keeps its place in the model"
    if isinstance(method, AdapterSpec) and method.placement == "parallel":
        return "parallel adapters keep their input in the model"
    if getattr(method, "target_parameters", None):
        return "PEFT puts target_parameters into the model in each pass"
    if lookup_family(family) is None:
        return f"not tried with {family}"
    if _changes_rope(meta.config):
        return f"{family} changes its rotary embedding with the length"
    return ""


def _changes_rope(config: Any) -> bool:
    """Whether a forward pass writes to the model's rotary embedding (transformers 5)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def find_random(config: TrainConfig, meta: Any, with_head: bool = False) -> str:
    """Return what is random in the blocks, or in the whole model, by its name in its config.

    Args:
        config: the configuration.
        meta: the model on the meta device.
        with_head: whether what stands before a classifier counts.
    """
    for owner in (config.method.model_dump(), meta.config.to_dict()):
        for name, value in owner.items():
            if not (isinstance(value, float) and value > 0):
                continue
            is_random = "drop" in name or "jitter" in name
            if is_random and (with_head or not name.startswith(("classifier", "summary"))):
                return f"{name} {value:g}"
    return ""
