"""Field types that several methods share."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

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
