"""The types in which a method gives its update as plain LoRA: ΔW = B · A, every scale in B."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.errors import InputError

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in the base."""
OUTPUT_LAYERS = ("lm_head", "embed_out")
"""Ends of the names of output layers."""


@dataclass(frozen=True)
class Factors:
    """The update B · A of one module, in float64.

    Attributes:
        a: (r, in); of an embedding (r, tokens).
        b: (out, r).
        is_embedding: whether the module looks rows up.
    """

    a: Any
    b: Any
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """How many columns of `a` and rows of `b` meet."""
        return int(self.a.shape[0])

    def padded(self, rank: int) -> Factors:
        """Return the same update with `rank` columns, the new ones zero."""
        import torch

        more = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(more, self.a.shape[1])])
        b = torch.cat([self.b, self.b.new_zeros(self.b.shape[0], more)], dim=1)
        return Factors(a, b, self.is_embedding)


@dataclass
class AdapterFile:
    """A saved adapter, from which its method takes what it understands.

    Attributes:
        config: its adapter_config.json.
        tensors: name in the base, or in the adapter where it stands outside → tensor; what is
            taken goes, so that what is left is what nobody understood.
        read_base: name of a tensor of the base → it.
        tied: name of the embedding → output layers that share its weight.
        said: what was changed on the way, for the user.
    """

    config: Mapping[str, Any]
    tensors: dict[str, Any]
    read_base: Callable[[str], Any]
    tied: Mapping[str, list[str]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def names(self, end: str) -> list[str]:
        """Return the modules that have a tensor called `end`."""
        return [key.removesuffix(f".{end}") for key in self.tensors if key.endswith(f".{end}")]

    def take(self, name: str, *ends: str) -> list[Any]:
        """Return the tensors of the module `name`, in float64, and forget them.

        Raises:
            InputError: one is not in the file.
        """
        lost = [end for end in ends if f"{name}.{end}" not in self.tensors]
        if lost:
            raise InputError(f"its file has no {name}.{lost[0]}. Was a copy cut short?")
        return [self.tensors.pop(f"{name}.{end}").double() for end in ends]


AsLora = Callable[[AdapterFile], dict[str, Factors]]
"""A saved adapter → the update of each module; raises InputError with the reason against."""


@dataclass(frozen=True)
class PlainForm:
    """How the adapters of a method become plain LoRA.

    Attributes:
        algebra: of the file alone, and of rows of the base; None where only the loaded layers can
            be asked.
        never: why no plain LoRA of a small rank says the same; empty where one may.
    """

    algebra: AsLora | None = None
    never: str = ""


ASKED = PlainForm()
"""Of a method whose loaded layers are asked."""
FULL_RANK = "changes every weight by a matrix of full rank, which no small A and B hold. Merge it"


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that the module `name` matches, as PEFT reads them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def spread(numbers: set[Any]) -> str:
    """Return a few numbers for a sentence: `2`, or `0.5 to 5.66`."""
    low, high = min(numbers), max(numbers)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
