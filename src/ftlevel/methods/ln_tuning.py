"""LN-tuning: spec → `peft.LNTuningConfig`."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods import LnTuningSpec
from ftlevel.methods.base import Base, Method


def build(spec: LnTuningSpec, base: Base) -> Any:
    """Return PEFT's config; `base.targets` are the norms."""
    from peft import LNTuningConfig

    return LNTuningConfig(
        task_type=base.task_type,
        target_modules=base.targets,
        modules_to_save=base.heads or None,
    )


METHOD = Method(build, targets_linears=False, adapts="norms")
