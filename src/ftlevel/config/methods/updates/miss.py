"""MiSS."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share


class MissSpec(MethodSpec):
    """MiSS: W + D, whose r columns repeat along the input: one matrix of shape (r, out) a linear.

    Kang and Yin (2024), who called it Bone before. The input's features are summed in r groups, so
    that the update is of rank r at most.
    """

    kind: Literal["miss"] = "miss"
    r: Positive = Field(64, description="Columns that repeat; no more than a linear's inputs.")
    miss_dropout: Share = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: TargetModules = "all-linear"
