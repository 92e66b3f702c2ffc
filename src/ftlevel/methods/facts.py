"""Rows and rules of the support table: which methods work with which models and tasks.

A row is a method or a variant of one, such as DoRA. Each method module declares its rows and
rules, and `ftlevel.methods` collects them. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.config.sections import Section


@dataclass(frozen=True)
class MethodFacts:
    """A row of the support table.

    Attributes:
        name: name of the row.
        kind: value of `--method`.
        flags: command-line flags that select the variant.
        trains: what is trained.
        merges: how adapters are merged; empty if they cannot be.
        paper: reference.
        llama_7b: trainable parameters on Llama-2-7B by default.
        fields: spec fields, by dotted name, that define the variant.
        also: other values of `--method` that have this variant.
    """

    name: str
    kind: str
    flags: str
    trains: str
    merges: str
    paper: str
    llama_7b: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    def matches(self, section: Section) -> bool:
        """Returns whether the method settings `section` select this row."""
        values = {"kind": (self.kind, *self.also), **self.fields}
        return all(_is_of(getattr(section, name, None), value) for name, value in values.items())


def single_row(
    kind: str, trains: str, merges: str, paper: str, llama_7b: int
) -> tuple[MethodFacts]:
    """Returns the support table of a method without variants: one row."""
    return (MethodFacts(kind, kind, f"--method {kind}", trains, merges, paper, llama_7b),)


def _is_of(value: Any, expected: Any) -> bool:
    if expected is ...:  # any value but None
        return value is not None
    return value in expected if isinstance(expected, tuple) else value == expected


MERGES = "yes"
"""Value of `merges` for exact merging, as with PEFT's `merge_and_unload`."""

CONV1D = frozenset({"gpt2"})
QUANTIZED = frozenset({"4bit", "8bit"})
_ANY: frozenset[str] = frozenset()


def rows(*names: str) -> frozenset[str]:
    """Returns row names as a frozenset."""
    return frozenset(names)


@dataclass(frozen=True)
class Rule:
    """A set of unsupported cells of the support table; an empty field matches all values.

    `why` is a clause with the reason, `instead` a sentence with an alternative.
    """

    rows: frozenset[str]
    why: str
    instead: str
    families: frozenset[str] = _ANY
    kinds: frozenset[str] = _ANY
    tasks: frozenset[str] = _ANY
    quants: frozenset[str] = _ANY
    experts: bool | None = None

    def covers(self, cell: Cell) -> bool:
        """Returns whether the rule applies to every combination in `cell`."""
        return self._applies(cell, to_part=False)

    def touches(self, cell: Cell) -> bool:
        """Returns whether the rule applies to some combination in `cell`."""
        return self._applies(cell, to_part=True)

    def _applies(self, cell: Cell, *, to_part: bool) -> bool:
        conditions: tuple[tuple[Any, Collection[Any]], ...] = (
            (cell.family, self.families),
            (cell.kind, self.kinds),
            (cell.task, self.tasks),
            (cell.quant, self.quants),
            (cell.experts, () if self.experts is None else (self.experts,)),
        )
        return cell.row in self.rows and all(
            not allowed or value in allowed or (to_part and value is None)
            for value, allowed in conditions
        )

    @property
    def where(self) -> str:
        """Describe the conditions other than the method: `with gpt2 and without --quant`."""
        parts = [f"with {' or '.join(sorted(self.families))}"] * bool(self.families)
        parts += [f"with {kind}s" for kind in sorted(self.kinds)]
        parts += ["with a base without experts"] * (self.experts is False)
        parts += [f"for {', '.join(sorted(self.tasks))}"] * bool(self.tasks)
        if self.quants == {"none"}:
            parts.append("without --quant")
        elif self.quants:
            parts.append(f"with --quant {' or '.join(sorted(self.quants))}")
        return " and ".join(parts)


@dataclass(frozen=True)
class Cell:
    """A row of the support table with a base model and a task; None stands for all values."""

    row: str = ""
    family: str | None = None
    kind: str | None = None
    task: str | None = None
    quant: str | None = None
    experts: bool | None = None
