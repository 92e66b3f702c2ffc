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
class MethodInfo:
    """A row of the support table: a method, or a variant of one.

    Attributes:
        method: value of `--method`.
        flags: command-line flags that select the variant.
        merges: how adapters are merged; empty if they cannot be.
        reference: paper or library that defines the method.
        llama_7b: number of trainable parameters on Llama-2-7B by default.
        fields: fields of the method's configuration, with the values that select the variant.
        other_methods: other values of `--method` that have this variant.
    """

    name: str
    method: str
    flags: str
    trained: str
    merges: str
    reference: str
    llama_7b: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    other_methods: tuple[str, ...] = ()

    def matches(self, section: Section) -> bool:
        """Returns whether the method configuration `section` selects this row."""
        values = {"kind": (self.method, *self.other_methods), **self.fields}
        return all(_is_of(getattr(section, name, None), value) for name, value in values.items())


def single_row(
    method: str, trained: str, merges: str, reference: str, llama_7b: int
) -> tuple[MethodInfo]:
    """Returns the `info` of a method without variants: a tuple with one `MethodInfo`."""
    return (MethodInfo(method, method, f"--method {method}", trained, merges, reference, llama_7b),)


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
    """Returns `names`, which name rows of the support table, as a frozenset for `Rule.rows`."""
    return frozenset(names)


@dataclass(frozen=True)
class Rule:
    """Unsupported combinations of method, model and task; a field that is empty matches any value.

    `why` is a clause with the reason, `instead` a sentence with an alternative.
    """

    rows: frozenset[str]
    why: str
    instead: str
    families: frozenset[str] = _ANY
    architectures: frozenset[str] = _ANY
    tasks: frozenset[str] = _ANY
    quants: frozenset[str] = _ANY
    experts: bool | None = None

    def matches(self, cell: Cell, *, on_none: bool = False) -> bool:
        """Returns whether the rule excludes `cell`; unset (None) fields match any if `on_none`."""
        values: tuple[tuple[Any, Collection[Any]], ...] = (
            (cell.family, self.families),
            (cell.architecture, self.architectures),
            (cell.task, self.tasks),
            (cell.quant, self.quants),
            (cell.experts, () if self.experts is None else (self.experts,)),
        )
        return cell.row in self.rows and all(
            not allowed or value in allowed or (on_none and value is None)
            for value, allowed in values
        )

    @property
    def condition(self) -> str:
        """Conditions besides the method, as text, such as `with gpt2 and without --quant`."""
        names = [f"with {' or '.join(sorted(self.families))}"] * bool(self.families)
        names += [f"with {name}s" for name in sorted(self.architectures)]
        names += ["with a base without experts"] * (self.experts is False)
        names += [f"for {', '.join(sorted(self.tasks))}"] * bool(self.tasks)
        if self.quants == {"none"}:
            names.append("without --quant")
        elif self.quants:
            names.append(f"with --quant {' or '.join(sorted(self.quants))}")
        return " and ".join(names)


@dataclass(frozen=True)
class Cell:
    """Row (method or variant), base model and task to look up in the support table; None: unset."""

    row: str = ""
    family: str | None = None
    architecture: str | None = None
    task: str | None = None
    quant: str | None = None
    experts: bool | None = None
