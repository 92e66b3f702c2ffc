"""Whether a run computes LoRA's layers in one node, and what the screen says about it."""

from __future__ import annotations

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.methods import METHODS


def uses_fused_layers(config: TrainConfig, device: str) -> bool:
    """Return whether LoRA's base and update are computed in one node."""
    return _reason_against(config, device) == ""


def low_rank_choices(config: TrainConfig, device: str) -> list[Choice]:
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
    if not speed.low_rank:
        return "speed.low_rank is off"
    if reason := against(config.method):
        return reason
    if config.quant.kind == "8bit" and device != "cpu":
        return "LLM.int8() multiplies in int8 on a GPU"
    return ""
