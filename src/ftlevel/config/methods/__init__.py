"""One spec a method: the fields a user may set, with the defaults of its paper.

`MethodConfig` is a union told apart by `kind`, so that a field of another method is an error.
Field names are those of the method's `peft` config.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ftlevel.config.methods.bottleneck import AdapterSpec
from ftlevel.config.methods.full import FullSpec
from ftlevel.config.methods.lora import LoraSpec, QloraSpec
from ftlevel.config.methods.prefix import PrefixSpec
from ftlevel.config.methods.soft_prompt import PromptSpec, PTuningSpec
from ftlevel.config.sections import Section

MethodConfig = Annotated[
    LoraSpec | QloraSpec | AdapterSpec | PrefixSpec | PromptSpec | PTuningSpec | FullSpec,
    Field(discriminator="kind"),
]

SPECS: dict[str, type[Section]] = {
    "lora": LoraSpec,
    "qlora": QloraSpec,
    "adapter": AdapterSpec,
    "prefix": PrefixSpec,
    "prompt": PromptSpec,
    "p-tuning": PTuningSpec,
    "full": FullSpec,
}
"""Every method by its name, in the order in which they are listed to users."""

DEFAULT_LEARNING_RATE: dict[str, float] = {
    "lora": 2e-4,  # QLoRA, table 9
    "qlora": 2e-4,
    "adapter": 3e-4,  # the middle of Houlsby et al.'s sweep, section 3.2
    "prefix": 1e-2,
    "prompt": 3e-2,
    "p-tuning": 1e-3,
    "full": 2e-5,  # BERT's
}
"""Learning rate where the user gives none, from the method's paper."""

__all__ = [
    "DEFAULT_LEARNING_RATE",
    "SPECS",
    "AdapterSpec",
    "FullSpec",
    "LoraSpec",
    "MethodConfig",
    "PTuningSpec",
    "PrefixSpec",
    "PromptSpec",
    "QloraSpec",
]
