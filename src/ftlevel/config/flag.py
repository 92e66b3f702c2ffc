"""What a row of the table of flags is: a flag, its names here, and its names in other tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftlevel.config.commands.check_served import CheckServedConfig
from ftlevel.config.commands.evaluate import EvaluateConfig
from ftlevel.config.commands.export import ExportConfig
from ftlevel.config.commands.generate import GenerateConfig
from ftlevel.config.commands.merge import MergeConfig
from ftlevel.config.commands.predict import PredictConfig
from ftlevel.config.commands.quantize import QuantizeConfig
from ftlevel.config.field_facts import FieldFacts, describe_field
from ftlevel.config.section import Section
from ftlevel.config.train import TrainConfig

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
