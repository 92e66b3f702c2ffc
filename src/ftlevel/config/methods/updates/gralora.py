"""GraLoRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share


class GraloraSpec(MethodSpec):
    """GraLoRA: W cut into gralora_k × gralora_k blocks, each with a LoRA of rank r / gralora_k.

    Jung et al. (2025, section 3): as many parameters as LoRA of rank r, of rank up to
    gralora_k · r.
    """

    kind: Literal["gralora"] = "gralora"
    r: Positive = Field(32, description="Rank of the LoRA with as many parameters.")
    alpha: float = Field(64.0, gt=0, description="Scale: the update is multiplied by alpha / r.")
    gralora_k: Positive = Field(2, description="Blocks along each side; must divide r.")
    gralora_dropout: Share = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: TargetModules = "all-linear"

    @model_validator(mode="after")
    def _blocks_share_the_rank(self) -> GraloraSpec:
        if self.r % self.gralora_k:
            raise ValueError(
                f"method.gralora_k {self.gralora_k} does not divide method.r {self.r}, which its "
                f"blocks share. Set method.r to a multiple of {self.gralora_k}"
            )
        return self
