"""LN-tuning: builds `peft.LNTuningConfig`."""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods.ln_tuning import LnTuningSpec
from ftlevel.methods.base import Base, Merging, Method
from ftlevel.methods.facts import MERGES, method_facts
from ftlevel.methods.plain_form import PlainForm
from ftlevel.methods.rates import Rates


def build(spec: LnTuningSpec, base: Base) -> Any:
    """Return PEFT's config; `base.targets` are the norm layers."""
    from peft import LNTuningConfig

    return LNTuningConfig(
        **base.shared,
    )


def find_targets(_spec: LnTuningSpec, model: Any) -> list[str]:
    """Return the full names of all norm layers of `model` outside its heads, sorted."""
    from ftlevel.models.module_tree import ModuleTree

    return sorted(ModuleTree(model).norm_names())


_METHOD = Method(
    (
        method_facts(
            "ln-tuning", "the norm layers", MERGES, "Zhao et al., 2024, arXiv:2312.11420", 266_240
        ),
    ),
    rate=Rates(narrow=5e-3, wide=1e-3, source="not measured", kinds={"encoder-decoder": 1e-2}),
    build=build,
    find_targets=find_targets,
    merging=Merging(
        ("LN_TUNING",), plain_form=PlainForm(never="trains norms, which are no matrices. Merge it")
    ),
)
METHODS = {"ln-tuning": _METHOD}
