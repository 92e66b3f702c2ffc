"""Full fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec
from ftlevel.config.sections import QuantConfig


class FullSpec(MethodSpec):
    """Full fine-tuning: train every weight of the model, without an adapter."""

    kind: Literal["full"] = "full"
    targets_linears: ClassVar[bool] = False
    freeze_base: bool = Field(
        False,
        description="Whether to train the new head only (linear probing). For tasks with their "
        "own head.",
    )

    def quant_problems(self, quant: QuantConfig) -> list[str]:
        """Reject quantized weights, which cannot be trained."""
        if quant.kind == "none":
            return []
        return [
            f"--quant {quant.kind} cannot be used with --method full: {quant.kind[0]}-bit weights "
            "receive no gradients. Use --method qlora, or drop --quant."
        ]


class LnTuningSpec(MethodSpec):
    """LN-tuning: train the weights and biases of all norm layers (Zhao et al., 2024)."""

    kind: Literal["ln-tuning"] = "ln-tuning"
    targets_linears: ClassVar[bool] = False
