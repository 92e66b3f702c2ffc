"""LoRA and QLoRA: spec → `peft.LoraConfig`."""

from __future__ import annotations

from peft import LoraConfig

from ftlevel.config.methods import LoraSpec


def build(
    spec: LoraSpec, targets: list[str], task_type: str, heads: list[str], fan_in_fan_out: bool
) -> LoraConfig:
    """Return PEFT's config for the resolved `targets`.

    Args:
        spec: what the user asked for.
        targets: full names of the modules that get an update.
        task_type: PEFT's TaskType.
        heads: modules that are trained and saved in full.
        fan_in_fan_out: whether the targets are Conv1D, whose weight is (in, out).
    """
    return LoraConfig(
        task_type=task_type,
        r=spec.r,
        # PEFT divides by r; a whole number stays one, so that saved configs compare equal.
        lora_alpha=int(spec.lora_alpha) if spec.lora_alpha.is_integer() else spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=targets,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        bias=spec.bias,
        modules_to_save=heads or None,
        fan_in_fan_out=fan_in_fan_out,
    )
