"""LN-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from ftlevel.config.methods.base import MethodSpec


class LnTuningSpec(MethodSpec):
    """LN-tuning: train the weights and biases of all norm layers (Zhao et al., 2024)."""

    kind: Literal["ln-tuning"] = "ln-tuning"
    targets_linears: ClassVar[bool] = False
