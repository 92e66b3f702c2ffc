"""OFT and BOFT: learned rotations of the weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Share


class OftSpec(MethodSpec):
    """OFT: W · R, with R block-diagonal and orthogonal (Qiu et al., 2023).

    R is a Cayley transform, by default by the Neumann series of OFTv2 (Qiu et al., 2025).
    """

    kind: Literal["oft"] = "oft"
    oft_block_size: int = Field(
        32, ge=2, description="Size of a rotated block; must divide every layer's input size."
    )
    module_dropout: Share = Field(
        0.0, description="Dropout probability of blocks, which stay unrotated."
    )
    block_share: bool = Field(
        False, description="Whether all blocks of a layer share one rotation."
    )
    use_cayley_neumann: bool = Field(
        True,
        description="Whether to approximate the Cayley transform by a Neumann series. It "
        "is faster and nearly orthogonal.",
    )
    target_modules: TargetModules = "all-linear"


class BoftSpec(MethodSpec):
    """BOFT: R as a product of sparse rotations (Liu et al., 2024).

    One butterfly factor: PEFT has more only with its CUDA extension, and silently uses one
    otherwise.
    """

    kind: Literal["boft"] = "boft"
    boft_block_size: int = Field(
        4, ge=2, description="Size of a rotated block; must divide every layer's input size."
    )
    boft_dropout: Share = Field(
        0.0, description="Dropout probability of blocks, which stay unrotated."
    )
    target_modules: TargetModules = "all-linear"
