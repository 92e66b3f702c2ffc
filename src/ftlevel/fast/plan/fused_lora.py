"""Whether LoRA's layers are each one fused autograd function, and what the screen says about it."""

from __future__ import annotations

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.methods import METHODS


def uses_fused_layers(config: TrainConfig, device: str) -> bool:
    """Return whether LoRA's base and update are one fused autograd function."""
    return _reason_against(config, device) == ""


def fused_lora_choices(config: TrainConfig, device: str) -> list[Choice]:
    """Return the line that says how LoRA's layers are computed; none for other methods."""
    reason = _reason_against(config, device)
    if reason is None:
        return []
    if reason:
        return [Choice("low-rank update", "PEFT's layers", reason)]
    return [Choice("low-rank update", "fused with the base", "same gradients as PEFT's layers")]


def _reason_against(config: TrainConfig, device: str) -> str | None:
    """Return why they are PEFT's layers, empty if they are not; None without such layers."""
    speed, against = config.speed, METHODS[config.method.kind].step.fusing
    if against is None:
        return None
    if not speed.fast:
        return "--no-fast"
    if not speed.fused_lora:
        return "speed.fused_lora is off"
    if reason := against(config.method):
        return reason
    if config.quant.kind == "8bit" and device != "cpu":
        return "LLM.int8() multiplies in int8 on a GPU"
    return ""
