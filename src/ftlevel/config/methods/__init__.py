"""One spec a method: the fields a user may set, with the defaults of its paper.

`MethodConfig` is a union told apart by `kind`, so that a field of another method is an error.
Field names are those of the method's `peft` config.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ftlevel.config.methods.full import FullSpec
from ftlevel.config.methods.lora import LoraSpec, QloraSpec
from ftlevel.config.sections import Section

MethodConfig = Annotated[LoraSpec | QloraSpec | FullSpec, Field(discriminator="kind")]

SPECS: dict[str, type[Section]] = {"lora": LoraSpec, "qlora": QloraSpec, "full": FullSpec}
"""Every method by its name, in the order in which they are listed to users."""

DEFAULT_LEARNING_RATE: dict[str, float] = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}
"""Learning rate where the user gives none: QLoRA's (table 9) for low rank, BERT's for full."""

__all__ = [
    "DEFAULT_LEARNING_RATE",
    "SPECS",
    "FullSpec",
    "LoraSpec",
    "MethodConfig",
    "QloraSpec",
]
