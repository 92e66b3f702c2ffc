"""PEFT methods; `ftlevel.config.methods.MODULES` maps each method to its module here.

Each module defines `METHODS`, the methods by name. May import models, but no data or training code;
importing this package does not import torch.
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
from ftlevel.methods.support_table import Cell, MethodInfo, Rule

TUNERS = "ftlevel.adapters"
"""Module that registers ftlevel's tuners for programs that load adapters with PEFT alone."""


class _Methods(dict[str, Method]):
    """Methods by name. Looking up one whose extension cannot be imported raises `ConfigError`."""

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
            yield name, import_module(f"{__name__}.{specs.MODULES[name]}").METHODS[name]
        elif method := try_load(_ADDED[name][1][1], _ADDED[name][0]):
            yield name, method


_ADDED = added("methods")
METHODS = _Methods(_load_methods())
"""All methods by name, in display order."""


def needs_import(config: specs.MethodSpec) -> str:
    """Returns the module to import before PEFT can load an adapter of `config`; "" if none."""
    return TUNERS if METHODS[config.kind].tuner else ""


def ensure_registered() -> None:
    """Register ftlevel's own tuners in PEFT (imports PEFT); further calls do nothing."""
    for method in METHODS.values():
        if method.tuner:
            import_module(method.tuner)


METHOD_INFO: dict[str, MethodInfo] = {
    row.name: row for method in METHODS.values() for row in method.info
}
"""Rows of the support table by name, in display order."""

RULES: tuple[Rule, ...] = tuple(
    dict.fromkeys(
        rule
        for method in sorted(METHODS.values(), key=lambda method: method.is_adapter)
        for rule in method.rules
    )
)
"""All rules, full fine-tuning first; the first that matches a cell says why it is unsupported."""


def rows_of(config: MethodSpec) -> list[MethodInfo]:
    """Returns the support-table rows of the method and of the variants that `config` uses."""
    return [row for row in METHOD_INFO.values() if row.matches(config)]


def get_rule(cell: Cell) -> Rule | None:
    """Returns the first rule that excludes the method, model and task of `cell`, or None."""
    return next((rule for rule in RULES if rule.matches(cell)), None)


def get_possible_rules(cell: Cell) -> list[Rule]:
    """Returns the rules that exclude `cell` for some values of its unset (None) fields."""
    return [rule for rule in RULES if rule.matches(cell, on_none=True)]


def explain(rule: Rule, info: MethodInfo, cell: Cell) -> str:
    """Returns why `rule` excludes the method `info` for the model and task in `cell`, and a fix."""
    flags = info.flags if not info.fields else info.flags.partition(f"--method {info.method} ")[2]
    limits = []
    if rule.architectures:
        limits.append(f"{cell.family}, an {cell.architecture}")
    elif rule.families or rule.experts is not None:
        limits.append(str(cell.family))
    if rule.tasks:
        limits.append(f"--task {cell.task}")
    if rule.quants and cell.quant != "none":
        limits.append(f"--quant {cell.quant}")
    condition = f" with {' and '.join(limits)}" if limits else ""
    return f"{flags} cannot be used{condition}: {rule.why}. {rule.instead}"


def explain_unsupported(config: MethodSpec, base: Cell) -> list[str]:
    """Returns an error message for each variant in `config` that does not support `base`."""
    cells = [(info, replace(base, row=info.name)) for info in rows_of(config)]
    return [explain(rule, info, cell) for info, cell in cells if (rule := get_rule(cell))]


def check_supported(config: MethodSpec, base: Cell) -> None:
    """Raise `ConfigError` if model and task `base` do not support the method of `config`."""
    if unsupported := explain_unsupported(config, base):
        raise ConfigError(unsupported)
