"""One spec a method: the fields a user may set, with the defaults of its paper.

`MethodConfig` is a union told apart by `kind`, so that a field of another method is an error.
Field names are those of the method's `peft` config.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ftlevel.config.sections import Positive, Section, Share

_REGEX_MARKS = re.compile(r"[\\*+?()\[\]{}^$|]")


class FullSpec(Section):
    """Train every weight of the model; no adapter."""

    kind: Literal["full"] = "full"


class LoraSpec(Section):
    """LoRA: W + (alpha / r) · B · A (Hu et al., 2021, section 4.1).

    The default targets every linear of the blocks, which QLoRA (Dettmers et al., 2023, section 4)
    found to be needed to match full fine-tuning.
    """

    kind: Literal["lora"] = "lora"
    r: Positive = Field(8, description="Rank of the update.")
    lora_alpha: float = Field(
        16.0, gt=0, description="Scale of the update: it is multiplied by lora_alpha / r."
    )
    lora_dropout: Share = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Module names with commas, one regular expression, or all-linear: every "
        "linear of the blocks, never a head.",
    )
    use_rslora: bool = Field(
        False, description="Scale by lora_alpha / sqrt(r) (rsLoRA, Kalajdzievski, 2023)."
    )
    use_dora: bool = Field(
        False, description="Train direction and magnitude apart (DoRA, Liu et al., 2024)."
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Which bias terms of the base are trained too."
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        """Read `a,b` as two names; a string with regular-expression marks stays one pattern."""
        if isinstance(value, str):
            value = value.strip()
            if not value:
                raise ValueError("no module is named")
            if value == "all-linear" or _REGEX_MARKS.search(value):
                return value
            return [name.strip() for name in value.split(",") if name.strip()]
        if isinstance(value, list) and not value:
            raise ValueError("no module is named")
        return value

    @field_validator("target_modules")
    @classmethod
    def _pattern_compiles(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression ({error})") from None
        return value


class QloraSpec(LoraSpec):
    """LoRA on a quantized base (Dettmers et al., 2023): 4 bits unless `quant` says 8."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]


MethodConfig = Annotated[FullSpec | LoraSpec | QloraSpec, Field(discriminator="kind")]

SPECS: dict[str, type[Section]] = {"lora": LoraSpec, "qlora": QloraSpec, "full": FullSpec}
"""Every method by its name, in the order in which they are listed to users."""

DEFAULT_LEARNING_RATE: dict[str, float] = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}
"""Learning rate where the user gives none: QLoRA's (table 9) for low rank, BERT's for full."""
