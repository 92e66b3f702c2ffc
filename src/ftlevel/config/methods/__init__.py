"""Method specs: fields named as in the `peft` config, with the defaults of the method's paper.

`ftlevel.methods` has an implementation for each spec; extensions add both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from ftlevel.config.methods.adalora import AdaloraSpec
from ftlevel.config.methods.base import MethodSpec
from ftlevel.config.methods.bottleneck import AdapterSpec
from ftlevel.config.methods.full import FullSpec, LnTuningSpec
from ftlevel.config.methods.lora import LoraSpec, QloraSpec
from ftlevel.config.methods.prefix import PrefixSpec
from ftlevel.config.methods.soft_prompt import PromptSpec, PTuningSpec
from ftlevel.config.methods.updates import (
    BoftSpec,
    C3aSpec,
    GraloraSpec,
    HiraSpec,
    Ia3Spec,
    LohaSpec,
    LokrSpec,
    MissSpec,
    OftSpec,
    ShiraSpec,
    VeraSpec,
)
from ftlevel.extensions import added, try_load

_CORE: tuple[type[MethodSpec], ...] = (
    LoraSpec,
    QloraSpec,
    AdapterSpec,
    PrefixSpec,
    PromptSpec,
    PTuningSpec,
    AdaloraSpec,
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
    LnTuningSpec,
    FullSpec,
)

SPECS: dict[str, type[MethodSpec]] = {s.model_fields["kind"].default: s for s in _CORE}
"""Specs by method name, in display order."""

for _name, (_source, (_spec, _)) in added("methods", SPECS).items():
    if (_found := try_load(_spec, _source)) is not None:
        SPECS[_name] = _found

BY_TARGETS: list[type[MethodSpec]] = sorted(
    SPECS.values(), key=lambda spec: not spec.targets_linears
)
"""Specs with target modules first: the order of tables and of the schema."""

if TYPE_CHECKING:
    MethodConfig = MethodSpec
else:
    MethodConfig = Annotated[Union[tuple(BY_TARGETS)], Field(discriminator="kind")]  # noqa: UP007

__all__ = ["BY_TARGETS", "SPECS", "LoraSpec", "MethodConfig", "MethodSpec"]
