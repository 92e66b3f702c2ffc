"""Types for converting an adapter to plain LoRA: ΔW = B · A, with all scales in B."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.errors import InputError

PREFIX = "base_model.model."
"""PEFT's prefix of module names in the base."""
OUTPUT_LAYERS = ("lm_head", "embed_out")
"""Name suffixes of output layers."""


@dataclass(frozen=True)
class Factors:
    """The update B · A of one module in float64: a `(r, in)`, b `(out, r)`.

    For an embedding a is `(r, tokens)`.
    """

    a: Any
    b: Any
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """The rank r."""
        return int(self.a.shape[0])

    def padded(self, rank: int) -> Factors:
        """Return the same update zero-padded to `rank`."""
        import torch

        more = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(more, self.a.shape[1])])
        b = torch.cat([self.b, self.b.new_zeros(self.b.shape[0], more)], dim=1)
        return Factors(a, b, self.is_embedding)


@dataclass
class AdapterFile:
    """A saved adapter during conversion.

    Attributes:
        config: its adapter_config.json.
        tensors: name -> tensor; converted tensors are removed, so the rest is unsupported.
        read_base: returns a base tensor by name.
        tied: embedding name -> output layers that share its weight.
        said: notes for the user about the conversion.
    """

    config: Mapping[str, Any]
    tensors: dict[str, Any]
    read_base: Callable[[str], Any]
    tied: Mapping[str, list[str]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def names(self, end: str) -> list[str]:
        """Return the modules that have a tensor with suffix `end`."""
        return [key.removesuffix(f".{end}") for key in self.tensors if key.endswith(f".{end}")]

    def take(self, name: str, *ends: str) -> list[Any]:
        """Remove and return tensors of module `name` in float64; raises `InputError` if missing."""
        lost = [end for end in ends if f"{name}.{end}" not in self.tensors]
        if lost:
            raise InputError(f"its file has no {name}.{lost[0]}. Is the copy incomplete?")
        return [self.tensors.pop(f"{name}.{end}").double() for end in ends]


AsLora = Callable[[AdapterFile], dict[str, Factors]]
"""Converts a saved adapter to updates by module name; raises `InputError` if unsupported."""


@dataclass(frozen=True)
class PlainForm:
    """Conversion to plain LoRA, from the file (`algebra`) or the loaded layers (None).

    `never` is the reason why no low-rank LoRA is equivalent; empty if one may be.
    """

    algebra: AsLora | None = None
    never: str = ""


ASKED = PlainForm()
"""Conversion by evaluating the loaded layers."""
FULL_RANK = "changes every weight by a matrix of full rank, which no small A and B hold. Merge it"


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the module `name`, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def spread(numbers: set[Any]) -> str:
    """Return the range of `numbers` as text: `2`, or `0.5 to 5.66`."""
    low, high = min(numbers), max(numbers)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
