"""`Flag`, a command-line flag, and `FieldMetadata`, type and help of a configuration field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ftlevel.config.evaluation import EvaluateConfig, GenerateConfig, PredictConfig
from ftlevel.config.merge import MergeConfig, QuantizeConfig
from ftlevel.config.section import Section
from ftlevel.config.train import TrainConfig
from ftlevel.extensions import added_rows, load


@dataclass(frozen=True)
class FieldMetadata:
    """Type, default and help of a configuration field, or of a flag without a field.

    Attributes:
        type: type on the command line: int, float, bool, Path, list[str], else str.
        choices: allowed values; empty if not enumerable.
        default: default shown in the help; empty if it is off or the description states it.
        example: example of a NAME=VALUE pair, for a field that is a mapping.
        minimum: smallest allowed value, if the field's type does not state it.
    """

    description: str
    type: Any = str
    choices: tuple[str, ...] = ()
    default: Any = ""
    required: bool = False
    is_number: bool = False
    example: str = ""
    minimum: int | None = None


def get_field_metadata(config: type[BaseModel], path: str) -> FieldMetadata:
    """Returns the metadata of the field at the dotted `path`; raises KeyError if there is none.

    If several methods have the field (`method.NAME`), the choices of all of them are combined.
    """
    *sections, name = path.split(".")
    models: list[type[BaseModel]] = [config]
    parent_description = ""
    for section in sections:
        info = models[0].model_fields[section]
        parent_description = info.description or ""
        models = [a for a in _union_types(info.annotation) if issubclass(a, BaseModel)]
    infos = {holder: holder.model_fields[name] for holder in models if name in holder.model_fields}
    if not infos:
        raise KeyError(path)
    first = next(iter(infos.values()))
    types = [type_ for info in infos.values() for type_ in _union_types(info.annotation)]
    is_literal = all(get_origin(type_) is Literal for type_ in types)
    example: Mapping[str, Any] = (first.examples or [{}])[0]
    choices = dict.fromkeys(str(v) for t in types for v in get_args(t)) if is_literal else ()
    return FieldMetadata(
        description=first.description or parent_description,
        type=_value_type(types),
        choices=tuple(choices),
        default=_default_of(infos),
        required=first.is_required(),
        is_number=bool({int, float} & set(types)),
        example=" ".join(f"{name}={value}" for name, value in example.items()),
    )


def _union_types(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _union_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [type_ for part in get_args(annotation) for type_ in _union_types(part)]
    return [] if annotation is NoneType else [annotation]


def _value_type(types: list[Any]) -> Any:
    base_types = {get_origin(type_) or type_ for type_ in types}
    if base_types == {dict}:
        return list[str]
    only = base_types.pop() if len(base_types) == 1 else str
    return only if only in (int, float, bool) else str


def _default_of(infos: dict[type[BaseModel], FieldInfo]) -> str:
    """Returns a field's default as text; if `infos` differ, that of the first: `8 with lora`."""
    defaults = [_format_default(info) for info in infos.values()]
    kind_field = next(iter(infos)).model_fields.get("kind")
    if len(set(defaults)) == 1 or kind_field is None or kind_field in infos.values():
        return defaults[0]
    return f"{defaults[0]} with {kind_field.default}" if defaults[0] else ""


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
    "generate": GenerateConfig,
    "merge": MergeConfig,
    "quantize": QuantizeConfig,
}
"""Configuration class that the flags of a command set."""


def config_of(command: str) -> type[Section] | None:
    """Returns the configuration class that the flags of `command` set; None if there is none."""
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
    """Flag value of another tool that changes nothing but may contradict a field.

    Attributes:
        reason: why the value changes nothing.
        path: dotted path of the field that it may contradict; empty for none.
        allowed: values of that field that agree with the flag; empty if all but `excluded` do.
        excluded: values of that field that contradict the flag.
        fix: last sentence of the error message.
    """

    reason: str
    path: str = ""
    allowed: tuple[Any, ...] = ()
    excluded: tuple[Any, ...] = ()
    fix: str = "Drop one of them"

    def accepts(self, value: Any) -> bool:
        """Returns whether `value` of the field `path` agrees with this flag value."""
        return (not self.allowed or value in self.allowed) and value not in self.excluded


ValueAliases = Mapping[str, str | NoOpValue]
"""Value in lower case → text that replaces it on the command line, or a `NoOpValue`.

A replacement may contain other flags ("4bit --quant-type nf4") or be empty.
"""


@dataclass(frozen=True)
class Alias:
    """Another tool's name of a flag, whose values differ from ftlevel's.

    Attributes:
        value: value that the alias sets, if the alias is a switch.
        values: value of the alias → replacement on the command line.
        convert: converts values that are not in `values`; raises ValueError if it cannot.
        multiple: whether the alias takes several values although the flag takes one.
    """

    name: str
    value: str | None = None
    values: ValueAliases = field(default_factory=dict)
    convert: Callable[[str], str] | None = None
    multiple: bool = False


@dataclass(frozen=True)
class FlagAliases:
    """Other names of a flag and of its values, mostly those of other tools.

    Attributes:
        names: other names of the flag.
        values: value → replacement on the command line, for every name of the flag.
        convert: converts values that are not in `values`, as in `Alias`.
        by_task: task → dotted path of the field that the flag sets instead.
    """

    names: Sequence[str | Alias] = ()
    values: ValueAliases = field(default_factory=dict)
    convert: Callable[[str], str] | None = None
    by_task: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: FlagAliases) -> FlagAliases:
        """Returns the aliases of `self` and `other`; where both define a value, `self` wins."""
        return FlagAliases(
            (*self.names, *other.names),
            {**other.values, **self.values},
            self.convert or other.convert,
            {**other.by_task, **self.by_task},
        )


@dataclass(frozen=True)
class Flag:
    """Flag or argument of one or several commands.

    Attributes:
        path: dotted path of the field that it sets, or empty; `method.NAME` is for any method.
        names: flag names as in Typer, or an argument's metavar; default: from `path`.
        panel: heading in `--help` and docs/cli.md.
        on: names of the commands that have it.
        multiple: whether it takes several values, separated by commas or spaces.
        rest: dotted path of a field that gets all values but the first.
        dest: parameter name in the command's function, if it differs from the flag's name.
        by_task: task → dotted path of the field that it sets instead of `path`.
        value: type, default and help of a flag without `path`.
    """

    path: str = ""
    names: str = ""
    panel: str = ""
    on: Sequence[str] = ("train",)
    aliases: FlagAliases = field(default_factory=FlagAliases)
    metavar: str | None = None
    required: bool = False
    multiple: bool = False
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
    def name(self) -> str:
        """Name of the flag in error messages."""
        if self.is_argument:
            return self.names
        return self.names.split()[0].partition("/")[0] if self.names else _flag_of(self.path)

    @property
    def parameter(self) -> str:
        """Name of this flag's parameter in the command's function."""
        if self.dest or not self.is_argument:
            return self.dest or self.name.lstrip("-").replace("-", "_")
        return self.path.replace(".", "_")

    def metadata(self, command: str) -> FieldMetadata:
        """Returns `value` if it is set, else the metadata of the field that the flag sets."""
        if self.value is not None:
            return self.value
        config = config_of(command)
        if config is None:
            raise ValueError(f"{self.name}: the command {command} has no configuration")
        metadata = get_field_metadata(config, self.path)
        for task, path in self.by_task.items():
            other = get_field_metadata(config, path)
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
    """Returns a `Flag` that sets no configuration field; `others` are further fields of `Flag`."""
    value = FieldMetadata(help, type, default=default, minimum=minimum)
    return Flag(names=names, value=value, **others)


@dataclass(frozen=True)
class UnsupportedFlag(Flag):
    """Flag of another tool for which ftlevel has no equivalent.

    Values in `aliases` are accepted without effect; `message` is the error for other values.
    """

    message: str = ""
