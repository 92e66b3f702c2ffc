"""Constraints between settings: A needs B, A excludes B, A has no effect with B.

A condition is `PATH` (the value is not the default), `PATH=A|B` or `PATH!=A|B`, with the dotted
path of a field. A placeholder, as in `output.dir RUN`, is shown where the value is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeAlias

from pydantic import BaseModel

from ftlevel.errors import excludes, has_no_effect, needs

_CONDITION = re.compile(r"(?P<path>[\w.]+)(?:(?P<sign>!?=)(?P<values>\S+))?(?: (?P<shown>.+))?")


@dataclass(frozen=True)
class Constraint:
    """Constraint between two settings, given as conditions.

    Attributes:
        setting: condition A.
        other: condition B.
        reason: clause that explains the constraint.
        fix: last sentence of the message; default: that of `needs`, `excludes` or `has_no_effect`.
        when: further conditions, joined by " & ", which the message does not name.
    """

    message: ClassVar[Any]
    find_flag: ClassVar[Callable[[str, type[BaseModel] | None], str]]
    """Implements `flag_name`; set by `config/flags.py`, which imports the configuration."""
    setting: str
    other: str
    reason: str = ""
    fix: str = ""
    when: str = ""

    def explain(self, config: BaseModel) -> str:
        """Returns the error message for `config`, which violates the constraint; else ""."""
        when, is_need = self.when.split(" & ") if self.when else (), isinstance(self, Needs)
        if not all(_holds(config, condition) for condition in (self.setting, *when)):
            return ""
        if _holds(config, self.other) == is_need:
            return ""
        describe = _describe_required if is_need else describe_setting
        setting = describe_setting(config, self.setting)
        return self.message(setting, describe(config, self.other), self.reason, self.fix)


class Needs(Constraint):
    """A needs B."""

    message = staticmethod(needs)


class Excludes(Constraint):
    """A and B exclude each other."""

    message = staticmethod(excludes)


class NoEffect(Constraint):
    """A has no effect with B."""

    message = staticmethod(has_no_effect)


Constraints: TypeAlias = tuple[Constraint, ...]


def list_violations(config: BaseModel, constraints: Iterable[Constraint]) -> Iterator[str]:
    """Yields an error message per constraint that `config` violates."""
    yield from filter(None, (one.explain(config) for one in constraints))


def flag_name(path: str, config: type[BaseModel] | None = None) -> str:
    """Returns the flag for the field `path` of `config`, or `path` if there is none.

    The default is `TrainConfig`. In one of its sections, `path` lacks the section.
    """
    return Constraint.find_flag(path, config)


def describe_setting(config: BaseModel, condition: str) -> str:
    """Returns the setting of `condition` as on the command line, such as `--optim sgd`."""
    path = _parse(condition)["path"]
    name, value = flag_name(path, type(config)), _get_value(config, path)[0]
    if isinstance(value, bool) and name != path:
        return name if value else f"--no-{name[2:]}"
    values = value if isinstance(value, list | tuple) else (value,)
    text = ",".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values)
    return name if value is None else f"{name}{'=' if name == path else ' '}{text}"


def _describe_required(config: BaseModel, condition: str) -> str:
    parts = _parse(condition)
    name, value = flag_name(parts["path"], type(config)), _get_value(config, parts["path"])[0]
    shown = parts["shown"] or " or ".join(
        (parts["values"] or "").replace("|", ", ").rsplit(", ", 1)
    )
    text = f"{name}{'=' if name == parts['path'] else ' '}{shown}" if shown else name
    return text if parts["sign"] != "=" or value is None else f"{text} (it is {value})"


@cache
def _parse(condition: str) -> dict[str, str]:
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise ValueError(f"{condition!r} is not a condition, such as quant.kind=4bit")
    return match.groupdict()


def _holds(config: BaseModel, condition: str) -> bool:
    parts = _parse(condition)
    value, default = _get_value(config, parts["path"])
    if parts["sign"] is None:
        return bool(value != default)
    return (str(value) in parts["values"].split("|")) == (parts["sign"] == "=")


def _get_value(config: BaseModel, path: str) -> tuple[Any, Any]:
    """Returns the value and the default of a field; (None, None) for a field of another method."""
    *sections, name = path.split(".")
    for section in sections:
        config = getattr(config, section)
    field = type(config).model_fields.get(name)
    if field is None:
        return None, None
    return getattr(config, name), field.get_default(call_default_factory=True)
