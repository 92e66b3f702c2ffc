"""Prefix tuning: spec → `PrefixKvConfig`, a tuner of our own.

PEFT's goes through the key-value cache, which classification heads, encoders and gradient
checkpointing do not have. config, layer, model and attention are a PEFT method as PEFT's own are;
they import peft and are only imported when one is built or loaded.
"""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods import PrefixSpec
from ftlevel.methods.base import Base, Method
from ftlevel.methods.peft_types import ensure_registered
from ftlevel.methods.prefix.sites import find_attentions, why_no_prefix

ENCODER_WIDTH = 512  # Li & Liang, 2021, section 4.3


def build(spec: PrefixSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    ensure_registered()
    from ftlevel.methods.prefix.config import PrefixKvConfig

    return PrefixKvConfig(
        task_type=base.task_type,
        num_virtual_tokens=spec.num_virtual_tokens,
        prefix_projection=spec.prefix_projection,
        encoder_hidden_size=spec.encoder_hidden_size or ENCODER_WIDTH,
        target_modules=base.targets,
        modules_to_save=base.heads or None,
    )


def find_targets(_spec: PrefixSpec, model: Any) -> list[str]:
    """Return the full names of the attentions of `model`, sorted."""
    return sorted(find_attentions(model))


def describe(spec: PrefixSpec) -> str:
    """Return the settings in a line."""
    width = spec.encoder_hidden_size or ENCODER_WIDTH
    projection = f", by an MLP of width {width}" if spec.prefix_projection else ""
    return f"{spec.num_virtual_tokens} keys and values in front of every attention{projection}"


def refuse(_spec: PrefixSpec, model_config: Any, _kind: str, _task: str, _quant: str) -> str | None:
    """Return why a prefix cannot be put into a model, and what works; None if it can."""
    reason = why_no_prefix(model_config)
    return f"{reason}. Use --method prompt, or --method lora." if reason else None


def finish(model: Any) -> None:
    """Drop the MLP of a trained prefix (in place): the prefix is what it computes."""
    model.base_model.fold(model.active_adapter)


METHOD = Method(
    build, find_targets, targets_linears=False, describe=describe, refuse=refuse, finish=finish
)
