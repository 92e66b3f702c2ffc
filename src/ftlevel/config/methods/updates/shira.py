"""SHiRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive


class ShiraSpec(MethodSpec):
    """SHiRA: W + S, S sparse with a random mask (Bhardwaj et al., 2024, section 3.1)."""

    kind: Literal["shira"] = "shira"
    r: Positive = Field(
        32, description="Rank that sets the trained weights per layer: r · (inputs + outputs)."
    )
    random_seed: int = Field(0, ge=0, description="Random seed of the sparse mask.")
    target_modules: TargetModules = "all-linear"
