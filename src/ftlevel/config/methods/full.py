"""Full fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec
from ftlevel.config.sections import QuantConfig


class FullSpec(MethodSpec):
    """Train every weight of the model; no adapter."""

    kind: Literal["full"] = "full"
    targets_linears: ClassVar[bool] = False
    freeze_base: bool = Field(
        False,
        description="Train the new head only, on frozen features: the baseline that a method has "
        "to beat. For tasks with a head of their own.",
    )

    def quant_problems(self, quant: QuantConfig) -> list[str]:
        """Refuse quantized weights, which cannot be trained themselves."""
        if quant.kind == "none":
            return []
        return [
            f"--quant {quant.kind} cannot be used with --method full: {quant.kind[0]}-bit weights "
            "receive no gradients. Use --method qlora, or drop --quant."
        ]
