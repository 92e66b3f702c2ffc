"""LoHa and LoKr: low-rank updates by Hadamard and Kronecker products."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share


class LohaSpec(MethodSpec):
    """LoHa: W + (alpha / r) · (B₁A₁ ⊙ B₂A₂), of rank up to r² (Hyeon-Woo et al., 2022)."""

    kind: Literal["loha"] = "loha"
    r: Positive = Field(8, description="Rank of each of the two factors.")
    alpha: float = Field(
        8.0, gt=0, description="Scaling numerator: the update is multiplied by alpha / r."
    )
    rank_dropout: Share = Field(0.0, description="Dropout probability of ranks.")
    module_dropout: Share = Field(0.0, description="Dropout probability of modules.")
    target_modules: TargetModules = "all-linear"


class LokrSpec(MethodSpec):
    """LoKr: W + (alpha / r) · C ⊗ (B · A), a Kronecker product (LyCORIS, Yeh et al., 2024)."""

    kind: Literal["lokr"] = "lokr"
    r: Positive = Field(8, description="Rank of the second factor.")
    alpha: float = Field(
        8.0, gt=0, description="Scaling numerator: the update is multiplied by alpha / r."
    )
    decompose_factor: int = Field(
        -1, ge=-1, description="Size of the first factor; -1 balances both factors."
    )
    rank_dropout: Share = Field(0.0, description="Dropout probability of ranks.")
    module_dropout: Share = Field(0.0, description="Dropout probability of modules.")
    target_modules: TargetModules = "all-linear"
