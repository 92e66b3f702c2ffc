"""What every spec of a method has, and the field types that several share."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from ftlevel.config.sections import QuantConfig, Section


class MethodSpec(Section):
    """The fields of one method that a user may set, and what the other sections must know of it.

    Attributes:
        kind: the name after `--method`, a literal with itself as the default.
        targets_linears: whether `--target-modules` applies.
        wants_quant: `--quant` where the user says nothing.
    """

    kind: str = ""
    targets_linears: ClassVar[bool] = True
    wants_quant: ClassVar[str] = "none"

    def quant_problems(self, quant: QuantConfig) -> list[str]:  # noqa: ARG002 - for those that do
        """Return why this method cannot be used on a base that is quantized as `quant` says.

        Only what must be said before a model is known; the rest is refused by the method's rules.
        """
        return []


_REGEX_MARKS = re.compile(r"[\\*+?()\[\]{}^$|]")


def _split_names(value: Any) -> Any:
    """Read `a,b` as two names; a string with regular-expression marks stays one pattern."""
    if isinstance(value, str):
        value = value.strip()
        if value == "all-linear" or _REGEX_MARKS.search(value):
            return value
        value = [name.strip() for name in value.split(",") if name.strip()]
    if value == []:
        raise ValueError("no module is named")
    return value


def _pattern_compiles(value: str | list[str]) -> str | list[str]:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
    return value


TargetModules = Annotated[
    str | list[str],
    BeforeValidator(_split_names),
    AfterValidator(_pattern_compiles),
    Field(
        description="Module names with commas, one regular expression, or all-linear: every "
        "linear of the blocks, never a head."
    ),
]
"""What `--target-modules` takes: a list of names, one regular expression, or "all-linear"."""
