"""HiRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec, TargetModules
from ftlevel.config.sections import Positive, Share


class HiraSpec(MethodSpec):
    """HiRA: W + W ⊙ (B · A), an update of high rank (Huang et al., 2025, section 3)."""

    kind: Literal["hira"] = "hira"
    r: Positive = Field(32, description="Rank of B · A.")
    hira_dropout: Share = Field(0.0, description="Dropout probability of the adapter's input.")
    target_modules: TargetModules = "all-linear"
