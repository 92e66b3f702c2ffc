"""`list-methods`: methods and their support for a model, a task and a quantization.

Imports torch and transformers only to find the family of a Hub, built-in or GGUF model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ftlevel.artifacts.files import read_json
from ftlevel.config import SPECS, normalize_task
from ftlevel.config.sections import QuantConfig
from ftlevel.config.tasks import TASKS as TASK_NAMES
from ftlevel.errors import ConfigError, InputError, did_you_mean, join_names
from ftlevel.methods import METHOD_INFO, explain, get_possible_rules, get_rule
from ftlevel.methods.support_table import Cell, MethodInfo
from ftlevel.models.families import Family, get_family
from ftlevel.tasks import TASKS

Answer = Literal["yes", "in part", "no"]
QUANTS: tuple[str, ...] = get_args(QuantConfig.model_fields["kind"].annotation)


@dataclass(frozen=True)
class MethodRow:
    """Support of a method; `works` is `in part` if it depends on an option that is not given."""

    name: str
    method: str
    flags: str
    works: Answer
    reasons: tuple[str, ...]
    trains: str
    merges: bool
    paper: str


@dataclass(frozen=True)
class MethodReport:
    """Methods, and the filters by which they were selected; a filter is None if not given."""

    model: str | None
    family: str | None
    kind: str | None
    task: str | None
    quant: str | None
    methods: tuple[MethodRow, ...]


def list_methods(
    model: str | None = None, task: str | None = None, quant: str | None = None
) -> MethodReport:
    """Describe every method for a model or family, a task and a quantization.

    Raises ConfigError for an unknown task or quantization, InputError for an unknown model or
    family.
    """
    task = _check_name("--task", normalize_task(task) if task else None, tuple(TASK_NAMES))
    quant = _check_name("--quant", quant, QUANTS)
    family = get_family(family_name(model)) if model else None
    rows = tuple(
        _row(info, family, task, quant) for info in METHOD_INFO.values() if info.method in SPECS
    )
    name, kind = (family.name, family.kind) if family else (None, None)
    return MethodReport(model, name, kind, task, quant, rows)


def _check_name(flag: str, value: str | None, names: tuple[str, ...]) -> str | None:
    if value is None or value in names:
        return value
    raise ConfigError(
        f"{flag} {value!r} is not known. Expected one of {join_names(names)}."
        f"{did_you_mean(value, names)}"
    )


def family_name(model: str) -> str:
    """Returns the `model_type` of a model; a family's name is unchanged. May raise InputError."""
    config = Path(model) / "config.json"
    if config.is_file():
        try:
            return str(read_json(config)["model_type"])
        except KeyError as error:
            raise InputError(f"{config} names no model_type ({error}).") from None
    if model.startswith("builtin:") or model.endswith(".gguf") or "/" in model:
        from ftlevel.models.loading import load_config
        from ftlevel.models.sources import resolve_source

        return str(load_config(resolve_source(model, display_name=model)).model_type)
    return model


def get_task_error(family: Family, task: str) -> str | None:
    """Returns why no method supports `task` on `family`; None if one does."""
    try:
        TASKS[task].auto_class(family.kind, family.name)
    except ConfigError as error:
        return str(error)
    heads = set(family.heads)
    if TASKS[task].has_new_head and (TASKS[task].head_like or task) not in heads:
        return f"transformers has no model of {family.name} for --task {task}."
    return None


def _row(info: MethodInfo, family: Family | None, task: str | None, quant: str | None) -> MethodRow:
    name, kind, experts = None, None, None
    if family:
        name, kind, experts = family.name, family.kind, bool(family.target_parameters)
    cell = Cell(info.name, name, kind, task, quant, experts)
    works: Answer = "yes"
    reasons: tuple[str, ...] = ()
    message = get_task_error(family, task) if family and task else None
    rule = get_rule(cell)
    if message:
        works, reasons = "no", (message,)
    elif rule is not None:
        works, reasons = "no", (explain(rule, info, cell),)
    elif limits := get_possible_rules(cell):
        works = "in part"
        reasons = tuple(f"not {limit.condition}: {limit.why}" for limit in limits)
    return MethodRow(
        info.name,
        info.method,
        info.flags,
        works,
        reasons,
        info.trained,
        bool(info.merges),
        info.reference,
    )
