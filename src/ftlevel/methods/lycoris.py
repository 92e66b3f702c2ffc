"""LoHa and LoKr: spec → `peft.LoHaConfig` and `peft.LoKrConfig`."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods.lycoris import LohaSpec, LokrSpec
from ftlevel.methods.base import Base, Merging, Method, whole
from ftlevel.methods.facts import CONV1D, MERGES, MethodFacts, Rule, rows
from ftlevel.methods.rates import Rates


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


_RULES = (
    Rule(
        rows("loha", "lokr"), "its linears are Conv1D, which PEFT does not take here",
        "Use --method lora.", families=CONV1D, quants=frozenset({"none"}),
    ),
    Rule(
        rows("loha", "lokr"), "PEFT multiplies the update with packed 4-bit weights",
        "Use --quant 8bit, or --method lora.", quants=frozenset({"4bit"}),
    ),
)  # fmt: skip
_LOHA = Method(
    (
        MethodFacts(
            "loha", "loha", "--method loha", "a product of two low-rank updates", MERGES,
            "Hyeon-Woo et al., 2022, arXiv:2108.06098", 39_976_960,
        ),
    ),
    rate=Rates(narrow=1e-2, wide=1e-3, source="not measured"),
    build=build_loha,
    rules=_RULES,
    merging=Merging(("LOHA",)),
)  # fmt: skip
_LOKR = Method(
    (
        MethodFacts(
            "lokr", "lokr", "--method lokr", "a Kronecker product as update", MERGES,
            "Yeh et al., 2024, arXiv:2309.14859", 1_331_200,
        ),
    ),
    rate=Rates(narrow=1e-2, wide=1e-3, source="not measured"),
    build=build_lokr,
    rules=_RULES,
    merging=Merging(("LOKR",)),
)  # fmt: skip
METHODS = {"loha": _LOHA, "lokr": _LOKR}
