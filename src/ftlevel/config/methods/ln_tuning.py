"""Tuning of the norms."""

from __future__ import annotations

from typing import Literal

from ftlevel.config.sections import Section


class LnTuningSpec(Section):
    """LN-tuning: train the weights and biases of all norm layers (Zhao et al., 2024)."""

    kind: Literal["ln-tuning"] = "ln-tuning"
