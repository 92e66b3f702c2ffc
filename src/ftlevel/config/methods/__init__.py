"""One spec a method: the fields a user may set, with the defaults of its paper.

`MethodConfig` is a union told apart by `kind`, so that a field of another method is an error.
Field names are those of the method's `peft` config. What else belongs to a method is in the module
of the same name in `ftlevel.methods`; it is registered by its line in `SPECS`, and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from ftlevel.config.methods.adalora import AdaloraSpec
from ftlevel.config.methods.base import MethodSpec
from ftlevel.config.methods.bottleneck import AdapterSpec
from ftlevel.config.methods.full import FullSpec
from ftlevel.config.methods.ia3 import Ia3Spec
from ftlevel.config.methods.ln_tuning import LnTuningSpec
from ftlevel.config.methods.lora import LoraSpec, QloraSpec
from ftlevel.config.methods.prefix import PrefixSpec
from ftlevel.config.methods.soft_prompt import PromptSpec, PTuningSpec
from ftlevel.config.methods.updates.c3a import C3aSpec
from ftlevel.config.methods.updates.gralora import GraloraSpec
from ftlevel.config.methods.updates.hira import HiraSpec
from ftlevel.config.methods.updates.lycoris import LohaSpec, LokrSpec
from ftlevel.config.methods.updates.miss import MissSpec
from ftlevel.config.methods.updates.orthogonal import BoftSpec, OftSpec
from ftlevel.config.methods.updates.shira import ShiraSpec
from ftlevel.config.methods.updates.vera import VeraSpec

_REGISTERED: tuple[type[MethodSpec], ...] = (
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

SPECS: dict[str, type[MethodSpec]] = {s.model_fields["kind"].default: s for s in _REGISTERED}
"""Every method by its name, in the order in which they are listed to users."""

BY_TARGETS: list[type[MethodSpec]] = sorted(_REGISTERED, key=lambda spec: not spec.targets_linears)
"""Those that adapt linears first: the order of tables and of the schema."""

if TYPE_CHECKING:
    MethodConfig = MethodSpec
else:
    MethodConfig = Annotated[Union[tuple(BY_TARGETS)], Field(discriminator="kind")]  # noqa: UP007

__all__ = ["BY_TARGETS", "SPECS", "LoraSpec", "MethodConfig", "MethodSpec"]
