"""What works with what: every refusal with its reason, and the nearest thing that works.

One table, collected from what the methods declare, feeds the engine, which refuses before weights
load, `ftlevel list-methods`, docs/methods.md and the sweep that trains every cell. It imports
nothing heavy. What a task needs of a model is in `ftlevel.tasks`; sizes that do not fit are found
in the model itself; what a method needs of a family that no table names is found by its `refuse`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ftlevel.config.methods import MethodSpec
from ftlevel.errors import ConfigError
from ftlevel.methods import METHODS
from ftlevel.methods.facts import Cell, MethodFacts, Rule

FACTS: dict[str, MethodFacts] = {
    row.name: row for method in METHODS.values() for row in method.facts
}
"""Every row by its name, in the order in which they are shown."""

RULES: tuple[Rule, ...] = tuple(
    dict.fromkeys(
        rule
        for method in sorted(METHODS.values(), key=lambda method: method.build is not None)
        for rule in method.rules
    )
)
"""Every refusal, those of training without an adapter first. The first that covers a cell is its
reason."""


def rows_of(spec: MethodSpec) -> list[MethodFacts]:
    """Return the rows that a run with `spec` is of: its method and its forms."""
    return [row for row in FACTS.values() if row.matches(spec)]


def find_refusal(cell: Cell) -> Rule | None:
    """Return why `cell` does not work, or None if it does, or does in part where it is open."""
    return next((rule for rule in RULES if rule.covers(cell)), None)


def find_limits(cell: Cell) -> list[Rule]:
    """Return the rules that refuse a part of an open `cell`."""
    return [rule for rule in RULES if rule.touches(cell)]


def explain(rule: Rule, row: MethodFacts, cell: Cell) -> str:
    """Say what cannot be used with what, why, and what to do."""
    asked = row.flags if not row.fields else row.flags.partition(f"--method {row.kind} ")[2]
    sides = []
    if rule.kinds:
        sides.append(f"{cell.family}, an {cell.kind}")
    elif rule.families or rule.experts is not None:
        sides.append(str(cell.family))
    if rule.tasks:
        sides.append(f"--task {cell.task}")
    if rule.quants and cell.quant != "none":
        sides.append(f"--quant {cell.quant}")
    with_what = f" with {' and '.join(sides)}" if sides else ""
    return f"{asked} cannot be used{with_what}: {rule.why}. {rule.instead}"


def find_problems(spec: MethodSpec, base: Cell) -> list[str]:
    """Return why a run with the method `spec` cannot be, one message a row of it that cannot.

    Args:
        spec: the method's spec.
        base: the model, the task and the quantization; its row is not looked at.
    """
    problems = []
    for row in rows_of(spec):
        cell = replace(base, row=row.name)
        rule = find_refusal(cell)
        if rule is not None:
            problems.append(explain(rule, row, cell))
    return problems


def check_supported(spec: MethodSpec, base: Cell) -> None:
    """Refuse a method that cannot work on a base, for a task.

    Raises:
        ConfigError: with each reason and the nearest thing that works.
    """
    problems = find_problems(spec, base)
    if problems:
        raise ConfigError(problems)


def known_rows(kinds: Iterable[str]) -> list[MethodFacts]:
    """Return the rows of the methods named `kinds`, in the order in which they are shown."""
    wanted = set(kinds)
    return [row for row in FACTS.values() if row.kind in wanted]
