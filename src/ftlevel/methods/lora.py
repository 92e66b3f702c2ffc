"""LoRA and QLoRA: spec → `peft.LoraConfig`."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods import LoraSpec
from ftlevel.methods.base import Base, Method


def build(spec: LoraSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import LoraConfig  # here: it imports bitsandbytes, which logs when imported

    return LoraConfig(
        task_type=base.task_type,
        r=spec.r,
        # PEFT divides by r; a whole number stays one, so that saved configs compare equal.
        lora_alpha=int(spec.lora_alpha) if spec.lora_alpha.is_integer() else spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=base.targets,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        bias=spec.bias,
        modules_to_save=base.heads or None,
        fan_in_fan_out=base.fan_in_fan_out,
    )


METHOD = Method(build)
