"""Whether LoRA's layers are each one fused autograd function, and what the screen says about it."""

from __future__ import annotations

from ftlevel.config import LoraSpec, TrainConfig
from ftlevel.config.choices import Choice


def uses_fused_layers(config: TrainConfig, device: str) -> bool:
    """Return whether LoRA's base and update are one fused autograd function."""
    return isinstance(config.method, LoraSpec) and _reason_against(config, device) is None


def fused_lora_choices(config: TrainConfig, device: str) -> list[Choice]:
    """Return the line that says how LoRA's layers are computed; none for other methods."""
    if not isinstance(config.method, LoraSpec):
        return []
    reason = _reason_against(config, device)
    if reason is not None:
        return [Choice("low-rank update", "PEFT's layers", reason)]
    return [Choice("low-rank update", "fused with the base", "same gradients as PEFT's layers")]


def _reason_against(config: TrainConfig, device: str) -> str | None:
    speed, method = config.speed, config.method
    if not speed.fast:
        return "--no-fast"
    if not speed.fused_lora:
        return "speed.fused_lora is off"
    if getattr(method, "use_dora", False):
        return "DoRA scales by a norm of the whole weight"
    if config.quant.kind == "8bit" and device != "cpu":
        return "LLM.int8() multiplies in int8 on a GPU"
    return None
