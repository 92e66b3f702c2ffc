"""VeRA: spec → `peft.VeraConfig`."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods.vera import VeraSpec
from ftlevel.methods.base import Base, Merging, Method
from ftlevel.methods.facts import MERGES, MethodFacts
from ftlevel.methods.rates import Rates


def build(spec: VeraSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import VeraConfig

    return VeraConfig(
        task_type=base.task_type,
        r=spec.r,
        d_initial=spec.d_initial,
        vera_dropout=spec.vera_dropout,
        projection_prng_key=spec.projection_prng_key,
        save_projection=True,
        target_modules=base.targets,
        modules_to_save=base.heads or None,
        fan_in_fan_out=base.fan_in_fan_out,
    )


_METHOD = Method(
    (
        MethodFacts(
            "vera", "vera", "--method vera", "two vectors beside every linear", MERGES,
            "Kopiczko et al., 2024, arXiv:2310.11454", 1_417_216,
        ),
    ),
    rate=Rates(narrow=3e-2, wide=4e-3, source="within the paper's range on GLUE"),
    build=build,
    merging=Merging(("VERA",)),
)  # fmt: skip
METHODS = {"vera": _METHOD}
