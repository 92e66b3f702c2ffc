"""VeRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share


class VeraSpec(MethodSpec):
    """VeRA: W + diag(b) · B · diag(d) · A (Kopiczko et al., 2024, equation 2).

    A and B are random, frozen and shared by all layers. They are drawn from `projection_prng_key`
    and saved with the adapter, which makes it independent of the library's random numbers.
    """

    kind: Literal["vera"] = "vera"
    r: Positive = Field(256, description="Rank of the shared random matrices.")
    d_initial: float = Field(0.1, gt=0, description="Initial value of the trained vector d.")
    vera_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    projection_prng_key: int = Field(0, ge=0, description="Random seed of the shared matrices.")
    target_modules: TargetModules = "all-linear"
