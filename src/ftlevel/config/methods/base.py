"""Base class of method specs, and field types that they share."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from ftlevel.config.sections import QuantConfig, Section


class MethodSpec(Section):
    """Settings of a fine-tuning method; `default_quant` is its default for `--quant`."""

    kind: str = ""
    all_linear: ClassVar[bool] = True
    default_quant: ClassVar[str] = "none"

    def validate_quant(self, quant: QuantConfig) -> list[str]:  # noqa: ARG002 - for those that do
        """Returns error messages if a base quantized with `quant` cannot be trained, else []."""
        return []


_REGEX_CHARS = re.compile(r"[\\*+?()\[\]{}^$|]")


def _split_names(value: Any) -> Any:
    """Split `a,b` into names; keep a regular expression as one pattern."""
    if isinstance(value, str):
        value = value.strip()
        if value == "all-linear" or _REGEX_CHARS.search(value):
            return value
        value = [name.strip() for name in value.split(",") if name.strip()]
    if value == []:
        raise ValueError("no module is named")
    return value


def _validate_pattern(value: str | list[str]) -> str | list[str]:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
    return value


TargetModules = Annotated[
    str | list[str],
    BeforeValidator(_split_names),
    AfterValidator(_validate_pattern),
    Field(
        description="Modules to adapt: comma-separated names, a regular expression, or "
        "all-linear. all-linear adapts every linear layer of the blocks, never a head."
    ),
]
"""List of names, one regular expression, or "all-linear"."""
