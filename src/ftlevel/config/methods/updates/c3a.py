"""C³A."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive


class C3aSpec(MethodSpec):
    """C³A: W + C with circulant blocks (Chen et al., 2024, section 3.3).

    C is initialized to zero, and randomly in PEFT.
    """

    kind: Literal["c3a"] = "c3a"
    block_size: Positive = Field(
        64, description="Block size; must divide every layer's input and output size."
    )
    target_modules: TargetModules = "all-linear"
