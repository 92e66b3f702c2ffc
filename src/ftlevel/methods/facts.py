"""What a method declares of itself as data: its rows of the table, and where they do not work.

A row is a method or a form of one: DoRA is LoRA with a switch, and has limits of its own. The rows
and rules stand in each method's module; `ftlevel.methods.matrix` collects them. Nothing here or
there imports torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.config.sections import Section


@dataclass(frozen=True)
class MethodFacts:
    """One row.

    Attributes:
        name: the row's name.
        kind: the `--method` that it belongs to.
        flags: how it is asked for.
        trains: what is trained.
        merges: how it becomes part of the weights; empty if it cannot.
        paper: where it was published.
        llama_7b: parameters that it trains on Llama-2-7B by default.
        fields: the spec's fields that make the form, by dotted name; none for a method itself.
        also: further methods of which it is a form.
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

    def matches(self, spec: Section) -> bool:
        """Whether a run with `spec` is of this row."""
        values = {"kind": (self.kind, *self.also), **self.fields}
        return all(_is_of(getattr(spec, name, None), value) for name, value in values.items())


def _is_of(found: Any, wanted: Any) -> bool:
    if wanted is ...:  # any value but none
        return found is not None
    return found in wanted if isinstance(wanted, tuple) else found == wanted


MERGES = "yes"
"""Of what becomes part of the weights, bit for bit as `merge_and_unload` of PEFT gives."""

CONV1D = frozenset({"gpt2"})
QUANTIZED = frozenset({"4bit", "8bit"})
_ANY: frozenset[str] = frozenset()


def rows(*names: str) -> frozenset[str]:
    """Return the names of the rows that a rule is of."""
    return frozenset(names)


@dataclass(frozen=True)
class Rule:
    """Cells that do not work. An empty field stands for every value.

    Attributes:
        rows: names of rows.
        why: the reason, as a clause after a colon.
        instead: the one thing to do, as a sentence.
        experts: whether the base has experts, where the rule asks.
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
        """Whether `cell` is one of these; where the cell is open, whether all of it is."""
        return (
            cell.row in self.rows
            and _inside(cell.family, self.families)
            and (self.experts is None or cell.experts == self.experts)
            and _inside(cell.kind, self.kinds)
            and _inside(cell.task, self.tasks)
            and _inside(cell.quant, self.quants)
        )

    def touches(self, cell: Cell) -> bool:
        """Whether some of `cell`, which may be open, is one of these."""
        return (
            cell.row in self.rows
            and _meets(cell.family, self.families)
            and (None in (self.experts, cell.experts) or cell.experts == self.experts)
            and _meets(cell.kind, self.kinds)
            and _meets(cell.task, self.tasks)
            and _meets(cell.quant, self.quants)
        )

    @property
    def where(self) -> str:
        """Name the cells beside the method: `with gpt2 and without --quant`."""
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
    """A method's row on a base, for a task; None leaves a side open."""

    row: str = ""
    family: str | None = None
    kind: str | None = None
    task: str | None = None
    quant: str | None = None
    experts: bool | None = None


def _inside(value: str | None, allowed: Collection[str]) -> bool:
    return not allowed or value in allowed


def _meets(value: str | None, allowed: Collection[str]) -> bool:
    return not allowed or value is None or value in allowed
