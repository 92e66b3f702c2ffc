"""C³A."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive


class C3aSpec(MethodSpec):
    """C³A: W + C, with C of circulant blocks: block_size numbers for block_size² weights.

    Chen et al. (2024, section 3.3). C begins at zero here, and at random in PEFT.
    """

    kind: Literal["c3a"] = "c3a"
    block_size: Positive = Field(
        64, description="Side of a block; must divide every linear's input and output."
    )
    target_modules: TargetModules = "all-linear"
