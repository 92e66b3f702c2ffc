"""How a step is computed: faster forms that give the same losses and gradients."""

from __future__ import annotations

from pydantic import Field

from ftlevel.config.sections import Section


class SpeedConfig(Section):
    """Which faster forms of the step are used. `fast: false` turns all of them off."""

    fast: bool = Field(
        True, description="Use the faster forms of the step; off leaves all to the libraries."
    )
    low_rank: bool = Field(
        True, description="Compute LoRA's base and update in one node, in the base's precision."
    )
    liger_kernel: bool = Field(
        True,
        description="On a CUDA GPU, use liger-kernel's norms, rotary embedding and activation "
        "where the package is installed and has them for the model.",
    )
