"""PEFT methods; `ftlevel.config.methods.MODULES` maps each method to its module here.

Each module defines `METHODS`: name -> `Method`. This module collects the support table; `merging`
maps PEFT types to methods. May import models, but no data or training code; importing this package
does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import NoReturn

from ftlevel.config import methods as specs
from ftlevel.config.methods import MethodSpec
from ftlevel.errors import ConfigError
from ftlevel.extensions import added, try_load
from ftlevel.methods.base import Base as Base
from ftlevel.methods.base import Method as Method
from ftlevel.methods.facts import Cell, MethodFacts, Rule

TUNERS = "ftlevel.adapters"
"""Module that registers ftlevel's tuners for programs that load adapters with PEFT alone."""


class _Methods(dict[str, Method]):
    """Methods by name; a method whose extension package cannot be imported raises `ConfigError`."""

    def __missing__(self, name: str) -> NoReturn:
        if name not in _ADDED:
            raise KeyError(name)
        raise ConfigError(
            f"--method {name}: the method of {_ADDED[name][0]} cannot be imported (see the warning "
            "above). Update or reinstall that package, or use another --method."
        )


def _load_methods() -> Iterator[tuple[str, Method]]:
    for spec in specs.BY_TARGETS:
        name = str(spec.model_fields["kind"].default)
        if name not in _ADDED:
            module = import_module(f"{__name__}.{specs.MODULES[name]}")
            yield name, module.METHODS[name]
        elif method := try_load(_ADDED[name][1][1], _ADDED[name][0]):
            yield name, method


_ADDED = added("methods")
METHODS = _Methods(_load_methods())
"""All methods by name, in display order."""


def needs_import(config: specs.MethodSpec) -> str:
    """Returns the module to import before PEFT alone can load an adapter of `config`, or ""."""
    return TUNERS if METHODS[config.kind].tuner else ""


def ensure_registered() -> None:
    """Register ftlevel's tuners in PEFT; idempotent. Imports peft."""
    for method in METHODS.values():
        if method.tuner:
            import_module(method.tuner)


FACTS: dict[str, MethodFacts] = {
    row.name: row for method in METHODS.values() for row in method.facts
}
"""Every row by name, in display order."""

RULES: tuple[Rule, ...] = tuple(
    dict.fromkeys(
        rule
        for method in sorted(METHODS.values(), key=lambda method: method.is_adapter)
        for rule in method.rules
    )
)
"""All rules, full fine-tuning first; the first rule that covers a cell is the reason."""


def rows_of(config: MethodSpec) -> list[MethodFacts]:
    """Returns the support-table rows that match `config`: its method and the variants it uses."""
    return [row for row in FACTS.values() if row.matches(config)]


def find_refusal(cell: Cell) -> Rule | None:
    """Returns the first rule by which every combination in `cell` is unsupported, or None."""
    return next((rule for rule in RULES if rule.covers(cell)), None)


def find_limits(cell: Cell) -> list[Rule]:
    """Returns the rules by which some combinations in `cell` are unsupported."""
    return [rule for rule in RULES if rule.touches(cell)]


def explain(rule: Rule, row: MethodFacts, cell: Cell) -> str:
    """Returns the error message of `rule`: what is unsupported, why, and what to do."""
    flags = row.flags if not row.fields else row.flags.partition(f"--method {row.kind} ")[2]
    sides = []
    if rule.kinds:
        sides.append(f"{cell.family}, an {cell.kind}")
    elif rule.families or rule.experts is not None:
        sides.append(str(cell.family))
    if rule.tasks:
        sides.append(f"--task {cell.task}")
    if rule.quants and cell.quant != "none":
        sides.append(f"--quant {cell.quant}")
    conditions = f" with {' and '.join(sides)}" if sides else ""
    return f"{flags} cannot be used{conditions}: {rule.why}. {rule.instead}"


def find_problems(config: MethodSpec, base: Cell) -> list[str]:
    """Returns an error message per variant in `config` that `base` does not support."""
    problems = []
    for row in rows_of(config):
        cell = replace(base, row=row.name)
        rule = find_refusal(cell)
        if rule is not None:
            problems.append(explain(rule, row, cell))
    return problems


def check_supported(config: MethodSpec, base: Cell) -> None:
    """Raise `ConfigError`, with reasons and alternatives, if the method does not support `base`."""
    problems = find_problems(config, base)
    if problems:
        raise ConfigError(problems)
