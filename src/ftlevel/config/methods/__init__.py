"""Method specs: fields named as in the `peft` config, with the defaults of the method's paper.

`ftlevel.methods` has an implementation for each spec; extensions add both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from ftlevel.config.methods.base import MethodSpec
from ftlevel.config.methods.lora import (
    AdaloraSpec,
    BoftSpec,
    C3aSpec,
    GraloraSpec,
    HiraSpec,
    Ia3Spec,
    LohaSpec,
    LokrSpec,
    LoraSpec,
    MissSpec,
    OftSpec,
    QloraSpec,
    ShiraSpec,
    VeraSpec,
)
from ftlevel.config.methods.other import (
    AdapterSpec,
    FullSpec,
    LnTuningSpec,
    PrefixSpec,
    PromptSpec,
    PTuningSpec,
)
from ftlevel.extensions import added, try_load

_CORE: dict[str, tuple[type[MethodSpec], ...]] = {
    "lora": (LoraSpec, QloraSpec),
    "bottleneck": (AdapterSpec,),
    "prefix": (PrefixSpec,),
    "soft_prompt": (PromptSpec, PTuningSpec),
    "adalora": (AdaloraSpec,),
    "updates": (
        Ia3Spec,
        VeraSpec,
        OftSpec,
        BoftSpec,
        LohaSpec,
        LokrSpec,
        MissSpec,
        ShiraSpec,
        HiraSpec,
        GraloraSpec,
        C3aSpec,
    ),
    "full": (LnTuningSpec, FullSpec),
}
"""Module of `ftlevel.methods` → specs of its methods, in display order."""

SPECS: dict[str, type[MethodSpec]] = {
    spec.model_fields["kind"].default: spec for specs in _CORE.values() for spec in specs
}
"""Specs by method name, in display order."""

MODULES = {s.model_fields["kind"].default: name for name, specs in _CORE.items() for s in specs}
"""Method name → module of `ftlevel.methods`."""

for _name, (_source, (_spec, _)) in added("methods", SPECS).items():
    if (_found := try_load(_spec, _source)) is not None:
        SPECS[_name] = _found

BY_TARGETS: list[type[MethodSpec]] = sorted(SPECS.values(), key=lambda spec: not spec.all_linear)
"""All specs, those with target modules first: the order of tables and of the schema."""

if TYPE_CHECKING:
    MethodConfig = MethodSpec
else:
    MethodConfig = Annotated[Union[tuple(BY_TARGETS)], Field(discriminator="kind")]  # noqa: UP007

__all__ = ["BY_TARGETS", "MODULES", "SPECS", "LoraSpec", "MethodConfig", "MethodSpec"]
