"""OFT and BOFT: learned rotations of the weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Share


class OftSpec(MethodSpec):
    """OFT: W · R, with R block-diagonal and orthogonal (Qiu et al., 2023).

    R acts on the linear's input and comes from a Cayley transform, by default through the
    Neumann series of OFTv2 (Qiu et al., 2025).
    """

    kind: Literal["oft"] = "oft"
    oft_block_size: int = Field(
        32, ge=2, description="Side of a rotated block; must divide every linear's input."
    )
    module_dropout: Share = Field(0.0, description="Share of blocks left unrotated in training.")
    block_share: bool = Field(False, description="One block for all of a linear.")
    use_cayley_neumann: bool = Field(
        True, description="Approximate the Cayley transform by a series: faster, almost orthogonal."
    )
    target_modules: TargetModules = "all-linear"


class BoftSpec(MethodSpec):
    """BOFT: R as a product of sparse rotations (Liu et al., 2024).

    One butterfly factor: PEFT has more only where its CUDA extension compiles, and takes one
    without a word elsewhere.
    """

    kind: Literal["boft"] = "boft"
    boft_block_size: int = Field(
        4, ge=2, description="Side of a rotated block; must divide every linear's input."
    )
    boft_dropout: Share = Field(0.0, description="Share of blocks left unrotated in training.")
    target_modules: TargetModules = "all-linear"
