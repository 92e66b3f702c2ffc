"""Full fine-tuning."""

from __future__ import annotations

from typing import Literal

from ftlevel.config.sections import Section


class FullSpec(Section):
    """Train every weight of the model; no adapter."""

    kind: Literal["full"] = "full"
