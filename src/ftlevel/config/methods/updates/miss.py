"""MiSS."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share


class MissSpec(MethodSpec):
    """MiSS: W + D, from one matrix (r, out) per layer; rank at most r (Kang and Yin, 2024)."""

    kind: Literal["miss"] = "miss"
    r: Positive = Field(
        64, description="Number of repeated columns; at most the input size of a layer."
    )
    miss_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"
