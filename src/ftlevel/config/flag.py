"""`Flag`, a row of the table of flags, and `FieldMetadata`, metadata of a configuration field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ftlevel.config.evaluation import EvaluateConfig, GenerateConfig, PredictConfig
from ftlevel.config.export import ExportConfig
from ftlevel.config.merge import MergeConfig, QuantizeConfig
from ftlevel.config.mining import MineConfig
from ftlevel.config.section import Section
from ftlevel.config.train import TrainConfig
from ftlevel.extensions import added_rows, load


@dataclass(frozen=True)
class FieldMetadata:
    """Metadata of a configuration field for help and docs.

    Attributes:
        type: type on the command line: int, float, bool, list[str] for pairs, else str.
        choices: allowed values; empty if not enumerable.
        default: default as shown; empty if off or part of the description.
    """

    description: str
    type: Any
    choices: tuple[str, ...]
    default: str
    required: bool
    takes_number: bool


def describe_field(config: type[BaseModel], path: str) -> FieldMetadata:
    """Return the metadata of the field at the dotted `path` of `config`, or raise KeyError.

    In a union of sections, such as the methods, choices come from all members that have the field.
    """
    *sections, name = path.split(".")
    holders: list[type[BaseModel]] = [config]
    above = ""
    for section in sections:
        info = holders[0].model_fields[section]
        above = info.description or ""
        holders = [a for a in _alternatives(info.annotation) if _is_section(a)]
    infos = {holder: holder.model_fields[name] for holder in holders if name in holder.model_fields}
    if not infos:
        raise KeyError(path)
    first = next(iter(infos.values()))
    kinds = [kind for info in infos.values() for kind in _alternatives(info.annotation)]
    closed = all(get_origin(kind) is Literal for kind in kinds)
    return FieldMetadata(
        description=first.description or above,
        type=_value_type(kinds),
        choices=tuple(dict.fromkeys(str(v) for k in kinds for v in get_args(k))) if closed else (),
        default=_default_of(infos),
        required=first.is_required(),
        takes_number=bool({int, float} & set(kinds)),
    )


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _alternatives(annotation: Any) -> list[Any]:
    """Return the member types of `annotation`: unions and Annotated unwrapped, no None."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _alternatives(part)]
    return [] if annotation is NoneType else [annotation]


def _value_type(kinds: list[Any]) -> Any:
    found = {get_origin(kind) or kind for kind in kinds}
    if found == {dict}:
        return list[str]
    only = found.pop() if len(found) == 1 else str
    return only if only in (int, float, bool) else str


def _default_of(infos: dict[type[BaseModel], FieldInfo]) -> str:
    """Return the default as shown; that of the first section if they differ."""
    shown = [_shown(info) for info in infos.values()]
    owner = next(iter(infos)).model_fields.get("kind")
    if len(set(shown)) == 1 or owner is None or owner in infos.values():
        return shown[0]
    return f"{shown[0]} with {owner.default}" if shown[0] else ""


def _shown(info: FieldInfo) -> str:
    value = None if info.is_required() else info.get_default(call_default_factory=True)
    if value is True:
        return "on"
    if not value and not (isinstance(value, (int, float)) and value is not False):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


CONFIGS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "preview": TrainConfig,
    "plan": TrainConfig,
    "init": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "mine": MineConfig,
    "generate": GenerateConfig,
    "merge": MergeConfig,
    "quantize": QuantizeConfig,
    "export": ExportConfig,
}
"""Command → configuration class that its flags set."""


def config_of(command: str) -> type[Section] | None:
    """Return the configuration class that the flags of `command` set, or None."""
    if command in CONFIGS:
        return CONFIGS[command]
    added = added_rows("commands").get(command)
    found: type[Section] | None = load(added.config) if added and added.config else None
    return found


def command_of(config: type[BaseModel]) -> str:
    """Return the first command whose flags set `config`; `train` if there is none."""
    commands = (*CONFIGS, *added_rows("commands"))
    return next((name for name in commands if config_of(name) is config), "train")


DAILY, MODEL, DATA = "Common options", "Model and method", "Data"
HOW, RUN, GENERAL = "Training", "Run", "General"
COMPARE, INFERENCE, WRITE = "Comparison", "Inference", "Output"
"""Headings of `--help` and docs/cli.md."""


@dataclass(frozen=True)
class NoOpValue:
    """Accepted value that needs no setting, provided a configuration field agrees.

    Attributes:
        path: field that must agree; empty if nothing can contradict.
        among: field values that agree; empty for all but those in `unless`.
        otherwise: advice if the field contradicts.
    """

    reason: str
    path: str = ""
    among: tuple[Any, ...] = ()
    unless: tuple[Any, ...] = ()
    otherwise: str = "Drop one of them"

    def holds(self, value: Any) -> bool:
        """Return whether the field value agrees."""
        return (not self.among or value in self.among) and value not in self.unless


ValueAliases = Mapping[str, str | NoOpValue]
"""Lowercase value → command-line fragment that replaces it, or the `NoOpValue` that checks it.

A fragment may contain other flags ("4bit --quant-type nf4") or be empty.
"""


@dataclass(frozen=True)
class Alias:
    """Alias of a flag from another tool whose values differ from ftlevel's.

    Attributes:
        value: value set by this switch.
        values: aliases of values; other values are passed unchanged.
        read: conversion of other values; raises ValueError if there is no counterpart.
        several: whether it takes several values although the flag takes one.
    """

    name: str
    value: str | None = None
    values: ValueAliases = field(default_factory=dict)
    read: Callable[[str], str] | None = None
    several: bool = False


@dataclass(frozen=True)
class Flag:
    """Flag or argument of one or several commands.

    Attributes:
        path: dotted path of its field; `method.NAME` is a field of any method. Empty if none.
        by_task: task → path of the field that it sets for this task instead.
        names: names as in Typer; an argument's metavar. Default: the field's name.
        panel: heading in `--help` and docs/cli.md.
        on: commands that have it.
        also: aliases from other tools.
        words: aliases of its values.
        read: conversion of other values, as in `Alias`.
        several: whether it takes several values, separated by commas or spaces.
        rest: path of the field for values after the first.
        example: example of a NAME=VALUE pair, for errors.
        noun: name of the setting, for errors about two aliases.
        help, type, default, minimum: for a flag that sets no field.
        answer: error for an unsupported flag, unless the value is in `words`.
    """

    path: str = ""
    names: str = ""
    panel: str = ""
    on: Sequence[str] = ("train",)
    also: Sequence[str | Alias] = ()
    words: ValueAliases = field(default_factory=dict)
    read: Callable[[str], str] | None = None
    metavar: str | None = None
    required: bool = False
    several: bool = False
    rest: str = ""
    example: str = ""
    noun: str = ""
    dest: str = ""
    help: str = ""
    type: Any = str
    default: Any = None
    minimum: int | None = None
    answer: str = ""
    by_task: Mapping[str, str] = field(default_factory=dict)

    @property
    def spellings(self) -> list[Alias]:
        """Aliases of the flag."""
        return [Alias(name) if isinstance(name, str) else name for name in self.also]

    @property
    def is_argument(self) -> bool:
        """Whether it is a positional argument."""
        return bool(self.names) and not self.names.startswith("-")

    @property
    def shown(self) -> str:
        """Name in error messages."""
        if self.is_argument:
            return self.names
        return self.names.split()[0].partition("/")[0] if self.names else _flag_of(self.path)

    @property
    def parameter(self) -> str:
        """Parameter name in the command's function."""
        if self.dest or not self.is_argument:
            return self.dest or self.shown.lstrip("-").replace("-", "_")
        return self.path.replace(".", "_")

    def facts(self, command: str) -> FieldMetadata | None:
        """Return the metadata of the field that it sets, or None."""
        config = config_of(command) if self.path else None
        if config is None:
            return None
        found = describe_field(config, self.path)
        for task, path in self.by_task.items():
            other = describe_field(config, path)
            default = f" (default: {other.default})" if other.default else ""
            found = replace(
                found,
                description=f"{found.description} With --task {task}{default}: "
                f"{other.description[:1].lower()}{other.description[1:]}",
                choices=tuple(dict.fromkeys((*found.choices, *other.choices))),
            )
        return found

    def typer_names(self, is_switch: bool) -> list[str]:
        """Return the names for Typer."""
        if self.names:
            return self.names.split()
        name = _flag_of(self.path)
        return [f"{name}/--no-{name[2:]}" if is_switch else name]


def _flag_of(path: str) -> str:
    return "--" + path.rpartition(".")[2].replace("_", "-")


def option(names: str, help: str, **others: Any) -> Flag:
    """Return a flag that sets no field."""
    return Flag(names=names, help=help, **others)


@dataclass(frozen=True)
class FlagAliases:
    """Further names and values of a flag of `train`; attributes as in `Flag`."""

    also: Sequence[str | Alias] = ()
    words: ValueAliases = field(default_factory=dict)
    read: Callable[[str], str] | None = None
