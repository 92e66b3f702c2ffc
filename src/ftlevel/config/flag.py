"""What a row of the table of flags is: a flag, its names here, and its names in other tools.

What a field of a configuration says of itself to help texts, docs and the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ftlevel.config.evaluation import EvaluateConfig, GenerateConfig, PredictConfig
from ftlevel.config.export import CheckServedConfig, ExportConfig
from ftlevel.config.merge import MergeConfig, QuantizeConfig
from ftlevel.config.section import Section
from ftlevel.config.train import TrainConfig


@dataclass(frozen=True)
class FieldFacts:
    """A field in the words of help and docs.

    Attributes:
        description: its help, whole.
        type: of a value on the command line: int, float, bool, list[str] for pairs, else str.
        choices: the values that there are, where they can be counted.
        default: as it is shown; empty where the description has it or it is off.
        required: whether there is no default.
        takes_number: whether a value may be a number.
    """

    description: str
    type: Any
    choices: tuple[str, ...]
    default: str
    required: bool
    takes_number: bool


def describe_field(config: type[BaseModel], path: str) -> FieldFacts:
    """Return the facts of the field at the dotted `path` of `config`.

    A part of the path may be one of several sections, such as a method: all that have the field
    give their choices, the first its help.

    Raises:
        KeyError: there is no such field.
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
    return FieldFacts(
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
    """Return the types that a value may have, without None, unions and bounds opened."""
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
    """Return the default as it is shown; where the holders differ, the first one's."""
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
    "compare": TrainConfig,
    "launch": TrainConfig,
    "init": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "generate": GenerateConfig,
    "merge": MergeConfig,
    "quantize": QuantizeConfig,
    "export": ExportConfig,
    "check-served": CheckServedConfig,
}
"""Command → the configuration that its flags set."""


DAILY, MODEL, DATA = "Daily", "Model and method", "Data"
HOW, RUN, GENERAL = "Optimisation", "Run", "General"
COMPARE, ANSWER, WRITE = "Comparison", "Answers", "Result"
"""Headings of `--help` and docs/cli.md."""


@dataclass(frozen=True)
class Agrees:
    """A word that asks for what is done anyhow, if the configuration says so.

    Attributes:
        reason: why nothing has to be set, as it is shown.
        path: the field that must agree; empty where nothing can contradict.
        among: the values with which it agrees; none for all but those in `unless`.
        unless: the values with which it does not.
        otherwise: what to do where it does not.
    """

    reason: str
    path: str = ""
    among: tuple[Any, ...] = ()
    unless: tuple[Any, ...] = ()
    otherwise: str = "Drop one of them"

    def holds(self, value: Any) -> bool:
        """Whether it agrees with `value` of the field."""
        return (not self.among or value in self.among) and value not in self.unless


Words = Mapping[str, str | Agrees]
"""A word for a value, in small letters → the piece of command line that it stands for, which may
go on with other flags ("4bit --quant-type nf4") or be empty; or what it agrees with."""


@dataclass(frozen=True)
class Spelling:
    """What another tool calls a flag, where its values are not ours.

    Attributes:
        name: as it is typed, with dashes; underscores are read as dashes everywhere.
        value: the spelling is a switch, and giving it sets the flag to this.
        values: their words; other values are passed on as they are.
        read: what else becomes of a value.

    `read` raises ValueError with the reason for a value that has no counterpart.
    """

    name: str
    value: str | None = None
    values: Words = field(default_factory=dict)
    read: Callable[[str], str] | None = None


@dataclass(frozen=True)
class Flag:
    """One flag or argument of one or several commands.

    Attributes:
        path: dotted path of the field that it sets, from the configuration of the command;
            `method.NAME` may be a field of any method. Empty: the command itself reads it.
        names: as Typer declares it, spaces between; an argument is its metavar. The default is
            the field's name, with `--no-…` for a switch.
        panel: heading under which `--help` and docs/cli.md show it.
        on: the commands that have it.
        also: other tools' names for it, which hold for every command that has the flag.
        words: other tools' words for its values.
        read: what else becomes of a value, as of `Spelling`.
        metavar: what stands for its value in help; the default is by the type.
        required: the command line is refused without it.
        several: it takes several values, with commas or spaces between.
        rest: path of the field that takes what is given beyond the first value.
        example: of a NAME=VALUE pair, for the error about one that is none.
        noun: what it sets, for the error about two spellings that are given together.
        dest: name of the parameter; the default is the flag's.
        help, type, default, minimum: of a flag that sets no field.
        answer: there is no such flag; whoever gives it is told this instead, but for `words`.
    """

    path: str = ""
    names: str = ""
    panel: str = ""
    on: Sequence[str] = ("train",)
    also: Sequence[str | Spelling] = ()
    words: Words = field(default_factory=dict)
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

    @property
    def spellings(self) -> list[Spelling]:
        """The second names."""
        return [Spelling(name) if isinstance(name, str) else name for name in self.also]

    @property
    def is_argument(self) -> bool:
        """Whether it stands without a name on the command line."""
        return bool(self.names) and not self.names.startswith("-")

    @property
    def shown(self) -> str:
        """What errors call it."""
        if self.is_argument:
            return self.names
        return self.names.split()[0].partition("/")[0] if self.names else _flag_of(self.path)

    @property
    def parameter(self) -> str:
        """The name under which a command reads it."""
        if self.dest or not self.is_argument:
            return self.dest or self.shown.lstrip("-").replace("-", "_")
        return self.path.replace(".", "_")

    def facts(self, command: str) -> FieldFacts | None:
        """Return what the field that it sets says of itself, if it sets one."""
        return describe_field(CONFIGS[command], self.path) if self.path else None

    def declared(self, is_switch: bool) -> list[str]:
        """Return the names as Typer takes them."""
        if self.names:
            return self.names.split()
        name = _flag_of(self.path)
        return [f"{name}/--no-{name[2:]}" if is_switch else name]


def _flag_of(path: str) -> str:
    return "--" + path.rpartition(".")[2].replace("_", "-")
