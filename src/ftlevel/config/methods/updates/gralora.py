"""GraLoRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share


class GraloraSpec(MethodSpec):
    """GraLoRA: k × k blocks, each a LoRA of rank r / k (Jung et al., 2025, section 3)."""

    kind: Literal["gralora"] = "gralora"
    r: Positive = Field(32, description="Rank of a LoRA with the same number of parameters.")
    alpha: float = Field(
        64.0, gt=0, description="Scaling numerator: the update is multiplied by alpha / r."
    )
    gralora_k: Positive = Field(2, description="Number of blocks per side; must divide r.")
    gralora_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"

    @model_validator(mode="after")
    def _blocks_share_the_rank(self) -> GraloraSpec:
        if self.r % self.gralora_k:
            raise ValueError(
                f"method.gralora_k {self.gralora_k} does not divide method.r {self.r}, which its "
                f"blocks share. Set method.r to a multiple of {self.gralora_k}"
            )
        return self
