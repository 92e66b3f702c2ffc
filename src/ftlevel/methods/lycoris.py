"""LoHa and LoKr: spec → `peft.LoHaConfig` and `peft.LoKrConfig`."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods import LohaSpec, LokrSpec
from ftlevel.methods.base import Base, Method, whole


def build_loha(spec: LohaSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import LoHaConfig

    return LoHaConfig(
        task_type=base.task_type,
        r=spec.r,
        alpha=whole(spec.alpha),
        rank_dropout=spec.rank_dropout,
        module_dropout=spec.module_dropout,
        target_modules=base.targets,
        modules_to_save=base.heads or None,
    )


def build_lokr(spec: LokrSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import LoKrConfig

    return LoKrConfig(
        task_type=base.task_type,
        r=spec.r,
        alpha=whole(spec.alpha),
        decompose_factor=spec.decompose_factor,
        rank_dropout=spec.rank_dropout,
        module_dropout=spec.module_dropout,
        target_modules=base.targets,
        modules_to_save=base.heads or None,
    )


LOHA = Method(build_loha)
LOKR = Method(build_lokr)
