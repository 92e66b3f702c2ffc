"""LoHa and LoKr: low-rank updates by Hadamard and Kronecker products."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share


class LohaSpec(MethodSpec):
    """LoHa: W + (alpha / r) · (B₁A₁ ⊙ B₂A₂), of rank up to r².

    FedPara (Hyeon-Woo et al., 2022, section 2), as LyCORIS names it.
    """

    kind: Literal["loha"] = "loha"
    r: Positive = Field(8, description="Rank of each of the two factors.")
    alpha: float = Field(8.0, gt=0, description="Scale: the update is multiplied by alpha / r.")
    rank_dropout: Share = Field(0.0, description="Share of ranks left out in training.")
    module_dropout: Share = Field(0.0, description="Share of modules left out in training.")
    target_modules: TargetModules = "all-linear"


class LokrSpec(MethodSpec):
    """LoKr: W + (alpha / r) · C ⊗ (B · A), a Kronecker product (LyCORIS, Yeh et al., 2024)."""

    kind: Literal["lokr"] = "lokr"
    r: Positive = Field(8, description="Rank of the second factor.")
    alpha: float = Field(8.0, gt=0, description="Scale: the update is multiplied by alpha / r.")
    decompose_factor: int = Field(
        -1, ge=-1, description="Side of the first factor; -1 makes both factors alike in size."
    )
    rank_dropout: Share = Field(0.0, description="Share of ranks left out in training.")
    module_dropout: Share = Field(0.0, description="Share of modules left out in training.")
    target_modules: TargetModules = "all-linear"
