"""Fields that are given as NAME=VALUE,NAME=VALUE on the command line, as a mapping in a recipe."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field


def split_pairs(value: Any) -> Any:
    """Read `a=1,b=2` as a mapping; what has no `=` stays as it is."""
    if not isinstance(value, str) or "=" not in value:
        return value
    found: dict[str, str] = {}
    for pair in filter(None, map(str.strip, value.split(","))):
        name, _, text = (part.strip() for part in pair.rpartition("="))
        if not (name and text):
            raise ValueError(f"{pair!r} is no NAME=VALUE; several stand with commas between")
        found[name] = text
    return found


Scalar = bool | int | float | str


def _read_scalars(value: Any) -> Any:
    """Read numbers and switches that are given as words."""
    if not isinstance(value := split_pairs(value), dict):
        return value
    return {name: _scalar(v) if isinstance(v, str) else v for name, v in value.items()}


def _scalar(text: str) -> Scalar:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


Scalars = Annotated[dict[str, Scalar], BeforeValidator(_read_scalars)]
"""Settings of something else, by its own names."""


def _read_names(value: Any) -> Any:
    """Read `a,b` as two names."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


def _read_tokens(value: Any) -> Any:
    """Read `12,<tool>` as an id and a token's text; texts with commas are given as a list."""
    names = _read_names(value)
    if isinstance(value, str):
        return [int(name) if name.isdecimal() else name for name in names]
    return names


Names = Annotated[list[str], BeforeValidator(_read_names)]
FewNames = Annotated[tuple[str, ...], BeforeValidator(_read_names)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)] | str], BeforeValidator(_read_tokens)]


def _read_weights(value: Any) -> Any:
    """Read weights of classes; what is no number above 0 is named with its class."""
    value = split_pairs(value)
    if value is None or value == "balanced":
        return value
    if not isinstance(value, dict) or not value:
        raise ValueError("expected balanced, or NAME=WEIGHT,NAME=WEIGHT")
    for name, weight in value.items():
        if isinstance(weight, bool) or not _is_positive(weight):
            raise ValueError(f"the weight of {name!r} is {weight}; a number above 0 is expected")
    return {str(name): float(weight) for name, weight in value.items()}


def _is_positive(weight: Any) -> bool:
    try:
        return 0 < float(weight) < math.inf
    except (TypeError, ValueError):
        return False


ClassWeights = Annotated[
    Literal["balanced"] | dict[str, float] | None,
    BeforeValidator(_read_weights),
    Field(
        description="How much each class or tag counts in training, where some are rare: "
        "balanced, or NAME=WEIGHT,NAME=WEIGHT, 1 for the others.",
    ),
]
