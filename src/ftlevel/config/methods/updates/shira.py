"""SHiRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive


class ShiraSpec(MethodSpec):
    """SHiRA: W + S, with S sparse: as many weights of each linear are trained as LoRA would add.

    Bhardwaj et al. (2024, section 3.1), with the mask that is drawn at random. The places are saved
    with the values.
    """

    kind: Literal["shira"] = "shira"
    r: Positive = Field(32, description="Trains r · (inputs + outputs) weights of a linear.")
    random_seed: int = Field(0, ge=0, description="Seed of the places that are trained.")
    target_modules: TargetModules = "all-linear"
