"""`Flag`, a command-line flag, and `FieldMetadata`, type and help of a configuration field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ftlevel.config.evaluation import EvaluateConfig, GenerateConfig, PredictConfig
from ftlevel.config.export import ExportConfig, MergeConfig, QuantizeConfig
from ftlevel.config.mining import MineConfig
from ftlevel.config.section import Section
from ftlevel.config.train import TrainConfig
from ftlevel.extensions import added_rows, load


@dataclass(frozen=True)
class FieldMetadata:
    """Metadata of a configuration field, or of a flag without one.

    Attributes:
        type: type on the command line: int, float, bool, Path, list[str], else str.
        choices: allowed values; empty if not enumerable.
        default: default as printed in the help; empty if it is off or the description has it.
        example: example of a NAME=VALUE pair, for a field that is a mapping.
        minimum: smallest allowed value, if the field's type does not state it.
    """

    description: str
    type: Any = str
    choices: tuple[str, ...] = ()
    default: Any = ""
    required: bool = False
    takes_number: bool = False
    example: str = ""
    minimum: int | None = None


def describe_field(config: type[BaseModel], path: str) -> FieldMetadata:
    """Returns the metadata of the field at the dotted `path` in `config`; may raise KeyError.

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
    types = [type_ for info in infos.values() for type_ in _alternatives(info.annotation)]
    is_closed = all(get_origin(type_) is Literal for type_ in types)
    choices = dict.fromkeys(str(v) for t in types for v in get_args(t)) if is_closed else ()
    return FieldMetadata(
        description=first.description or above,
        type=_value_type(types),
        choices=tuple(choices),
        default=_default_of(infos),
        required=first.is_required(),
        takes_number=bool({int, float} & set(types)),
        example=_format_example(first),
    )


def _format_example(info: FieldInfo) -> str:
    """Returns the first example of a mapping as NAME=VALUE."""
    return " ".join(f"{name}={value}" for name, value in (info.examples or [{}])[0].items())


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _alternatives(annotation: Any) -> list[Any]:
    """Returns the types in `annotation`, with unions and Annotated unwrapped, except None."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [type_ for part in get_args(annotation) for type_ in _alternatives(part)]
    return [] if annotation is NoneType else [annotation]


def _value_type(types: list[Any]) -> Any:
    origins = {get_origin(type_) or type_ for type_ in types}
    if origins == {dict}:
        return list[str]
    only = origins.pop() if len(origins) == 1 else str
    return only if only in (int, float, bool) else str


def _default_of(infos: dict[type[BaseModel], FieldInfo]) -> str:
    """Returns the default as printed; if it depends on the method, as `8 with lora`."""
    defaults = [_format_default(info) for info in infos.values()]
    owner = next(iter(infos)).model_fields.get("kind")
    if len(set(defaults)) == 1 or owner is None or owner in infos.values():
        return defaults[0]
    return f"{defaults[0]} with {owner.default}" if defaults[0] else ""


def _format_default(info: FieldInfo) -> str:
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
"""Command → configuration class that the flags set."""


def config_of(command: str) -> type[Section] | None:
    """Returns the configuration class that the flags of `command` set, or None."""
    if command in CONFIGS:
        return CONFIGS[command]
    added = added_rows("commands").get(command)
    config: type[Section] | None = load(added.config) if added and added.config else None
    return config


def command_of(config: type[BaseModel]) -> str:
    """Returns the first command whose flags set `config`; `train` if there is none."""
    commands = (*CONFIGS, *added_rows("commands"))
    return next((name for name in commands if config_of(name) is config), "train")


DAILY, MODEL, DATA = "Common options", "Model and method", "Data"
HOW, RUN, GENERAL = "Training", "Run", "General"
COMPARE, INFERENCE, WRITE = "Comparison", "Inference", "Output"
"""Headings of `--help` and docs/cli.md."""


@dataclass(frozen=True)
class NoOpValue:
    """Flag value without effect; an error only if the field at `path` contradicts it.

    Attributes:
        path: dotted path of the field to check; empty for no check.
        among: field values that agree with it; empty for all except those in `unless`.
        otherwise: advice in the error message for a contradiction.
    """

    reason: str
    path: str = ""
    among: tuple[Any, ...] = ()
    unless: tuple[Any, ...] = ()
    otherwise: str = "Drop one of them"

    def holds(self, value: Any) -> bool:
        """Returns whether the field's `value` agrees with this flag value."""
        return (not self.among or value in self.among) and value not in self.unless


ValueAliases = Mapping[str, str | NoOpValue]
"""Lowercase value → command-line fragment that replaces it, or the `NoOpValue` that checks it.

A fragment may contain other flags ("4bit --quant-type nf4") or be empty.
"""


@dataclass(frozen=True)
class Alias:
    """Other tool's name for a flag, with values that differ from ftlevel's.

    Attributes:
        value: value of the flag that this alias stands for, if the alias is a switch.
        convert: converts values that are not in `values`; raises ValueError if it cannot.
        several: whether the alias takes several values although the flag takes one.
    """

    name: str
    value: str | None = None
    values: ValueAliases = field(default_factory=dict)
    convert: Callable[[str], str] | None = None
    several: bool = False


@dataclass(frozen=True)
class FlagAliases:
    """Other names of a flag and aliases of its values, mostly those of other tools.

    Attributes:
        names: other names of the flag.
        values: aliases of its values, accepted with all names of the flag.
        convert: converts values that are not in `values`, as in `Alias`.
    """

    names: Sequence[str | Alias] = ()
    values: ValueAliases = field(default_factory=dict)
    convert: Callable[[str], str] | None = None

    def __or__(self, other: FlagAliases) -> FlagAliases:
        """Returns the aliases of both; values and conversion of `self` take precedence."""
        return FlagAliases(
            (*self.names, *other.names),
            {**other.values, **self.values},
            self.convert or other.convert,
        )


@dataclass(frozen=True)
class Flag:
    """Flag or argument of one or several commands.

    Attributes:
        path: dotted path of the field it sets, or empty; `method.NAME` is for any method.
        names: flag names as in Typer, or an argument's metavar; default: from `path`.
        panel: heading in `--help` and docs/cli.md.
        on: commands that have it.
        several: whether it takes several values, separated by commas or spaces.
        is_repeatable: whether it may be given several times.
        rest: dotted path of a second field, which is set to all values but the first.
        dest: parameter name in the command's function, if it differs from the flag's name.
        by_task: task → dotted path of the field set for that task, instead of `path`.
        value: metadata of a flag without `path`; its `default` is the parameter's.
    """

    path: str = ""
    names: str = ""
    panel: str = ""
    on: Sequence[str] = ("train",)
    aliases: FlagAliases = field(default_factory=FlagAliases)
    metavar: str | None = None
    required: bool = False
    several: bool = False
    is_repeatable: bool = False
    rest: str = ""
    dest: str = ""
    by_task: Mapping[str, str] = field(default_factory=dict)
    value: FieldMetadata | None = None

    @property
    def alias_names(self) -> list[Alias]:
        """Other names of the flag."""
        return [Alias(n) if isinstance(n, str) else n for n in self.aliases.names]

    @property
    def is_argument(self) -> bool:
        """Whether it is a positional argument."""
        return bool(self.names) and not self.names.startswith("-")

    @property
    def shown(self) -> str:
        """Name of the flag in error messages."""
        if self.is_argument:
            return self.names
        return self.names.split()[0].partition("/")[0] if self.names else _flag_of(self.path)

    @property
    def parameter(self) -> str:
        """Name of the parameter for this flag in the command's function."""
        if self.dest or not self.is_argument:
            return self.dest or self.shown.lstrip("-").replace("-", "_")
        return self.path.replace(".", "_")

    def metadata(self, command: str) -> FieldMetadata:
        """Returns type, default and help: those of the field that the flag sets, or its own."""
        if self.value is not None:
            return self.value
        config = config_of(command)
        if config is None:
            raise ValueError(f"{self.shown}: the command {command} has no configuration")
        metadata = describe_field(config, self.path)
        for task, path in self.by_task.items():
            other = describe_field(config, path)
            default = f" (default: {other.default})" if other.default else ""
            metadata = replace(
                metadata,
                description=f"{metadata.description} With --task {task}{default}: "
                f"{other.description[:1].lower()}{other.description[1:]}",
                choices=tuple(dict.fromkeys((*metadata.choices, *other.choices))),
            )
        return replace(metadata, type=list[str]) if self.is_repeatable else metadata

    def typer_names(self, is_switch: bool) -> list[str]:
        """Returns the names to declare in Typer, such as `--pack/--no-pack` for a switch."""
        if self.names:
            return self.names.split()
        name = _flag_of(self.path)
        return [f"{name}/--no-{name[2:]}" if is_switch else name]


def _flag_of(path: str) -> str:
    return "--" + path.rpartition(".")[2].replace("_", "-")


def option(
    names: str,
    help: str,
    *,
    type: Any = str,
    default: Any = None,
    minimum: int | None = None,
    **others: Any,
) -> Flag:
    """Returns a flag or argument that sets no configuration field."""
    value = FieldMetadata(help, type, default=default, minimum=minimum)
    return Flag(names=names, value=value, **others)


@dataclass(frozen=True)
class UnsupportedFlag(Flag):
    """Flag of a different tool without a counterpart.

    Values in `aliases` are accepted; `message` is the error for all other values.
    """

    message: str = ""
