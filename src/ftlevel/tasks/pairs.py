"""What was predicted and what is true, row by row: what meters of classes and tags keep."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

P = TypeVar("P", bound="Pairs")


class Pairs:
    """What was predicted and what is true, row by row."""

    def __init__(self) -> None:
        self.predicted: list[Any] = []
        self.true: list[Any] = []

    def pool(self: P, meters: Sequence[P]) -> P:
        """Return a meter of all their rows."""
        pooled = copy.copy(self)
        pooled.predicted = [value for meter in meters for value in meter.predicted]
        pooled.true = [value for meter in meters for value in meter.true]
        return pooled

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what was predicted for the only example seen and what is true, in words.

        Args:
            names: of the classes or tags.
        """
        return {
            "predicted": _in_words(self.predicted[0], names),
            "true": _in_words(self.true[0], names),
        }


def _in_words(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, int) and names:
        return names[value]
    if isinstance(value, list) and value and isinstance(value[0], int):
        return [name for name, is_set in zip(names, value, strict=True) if is_set]
    return value
