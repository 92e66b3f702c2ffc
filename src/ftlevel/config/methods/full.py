"""Full fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftlevel.config.sections import Section


class FullSpec(Section):
    """Train every weight of the model; no adapter."""

    kind: Literal["full"] = "full"
    freeze_base: bool = Field(
        False,
        description="Train the new head only, on frozen features: the baseline that a method has "
        "to beat. For tasks with a head of their own.",
    )
