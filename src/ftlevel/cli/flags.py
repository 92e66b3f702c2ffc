"""From the table of flags to Typer's options, and from what was given to a configuration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import typer

from ftlevel.artifacts.places import PLACES, check_places, read_run
from ftlevel.artifacts.run_directory import CONFIG
from ftlevel.cli.typed.completion import completer
from ftlevel.cli.typed.grammar import Command
from ftlevel.cli.typed.recipe_file import check_recipe
from ftlevel.cli.typed.spelling import Claim, Reading, check_claims, readings_of
from ftlevel.config import (
    Layer,
    TrainConfig,
    build_config,
    build_section,
    put,
    read_recipe,
    read_settings,
)
from ftlevel.config.field_facts import FieldFacts
from ftlevel.config.flag import Flag
from ftlevel.config.flags import flags_of
from ftlevel.config.section import Section
from ftlevel.errors import ConfigError
from ftlevel.world import is_launched

S = TypeVar("S", bound=Section)
_NEXT_PAIR = re.compile(r",\s*(?=\w+=)")  # of `text=Body,label=Category`
_WIDEST_CHOICES = 20  # letters that stand for a value in help


def add_command(
    app: typer.Typer, name: str, function: Callable[..., None], flags: Sequence[Flag]
) -> None:
    """Add a command to `app` that has its flags from the table.

    `function` names the flags that it reads itself as its parameters, and `given` for all of them.
    """
    rows = flags_of(name, flags)

    class Own(Command):
        readings: ClassVar[Mapping[str, Reading]] = readings_of(name, flags)

    def call(ctx: typer.Context, **values: Any) -> None:
        typed, claims = ctx.meta.get("ftlevel.typed", {}), ctx.meta.get("ftlevel.claims", [])
        values["given"] = Given(name, rows, values.copy(), ctx.obj or [], typed, claims)
        function(**{parameter: values[parameter] for parameter in reads})

    reads = inspect.signature(function).parameters
    call.__dict__["__signature__"] = _signature_of(name, rows)
    call.__doc__ = function.__doc__
    app.command(name=name, cls=Own)(call)


def _signature_of(command: str, rows: Sequence[Flag]) -> inspect.Signature:
    """Return the signature in which Typer finds the flags of `command`."""
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    return inspect.Signature([context, *(p for row in rows for p in _parameters_of(command, row))])


def _parameters_of(command: str, row: Flag) -> Iterator[inspect.Parameter]:
    facts = row.facts(command)
    kind = row.type if facts is None or facts.type is str else facts.type
    short = _short_choices(facts)
    shown: dict[str, Any] = {
        "help": row.help if facts is None else _help_of(facts, row),
        "metavar": row.names if row.is_argument else row.metavar or short or None,
        "min": row.minimum,
        "rich_help_panel": row.panel or None,
        "show_default": row.default is not None,
        "autocompletion": completer(row, facts),
    }
    if row.is_argument:
        yield _parameter(row, kind, typer.Argument(**shown))
        return
    yield _parameter(row, kind, typer.Option(*row.declared(kind is bool), **shown))


def _parameter(row: Flag, kind: Any, info: Any) -> inspect.Parameter:
    default = False if kind is bool and not row.path else row.default
    return inspect.Parameter(
        row.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind if row.required or default is not None else kind | None, info],
        default=inspect.Parameter.empty if row.required else default,
    )


def _short_choices(facts: FieldFacts | None) -> str:
    """Return the choices of a field where they are short enough to stand for its value."""
    choices = "|".join(facts.choices) if facts else ""
    return choices if len(choices) <= _WIDEST_CHOICES else ""


def _help_of(facts: FieldFacts, row: Flag) -> str:
    """Return the help of a flag that sets a field: its text, and choices and default if untold."""
    told = _short_choices(facts) or all(word in facts.description for word in facts.choices)
    notes = [
        "" if told else ", ".join(facts.choices),
        f"default: {facts.default}" if facts.default else "",
        "required" if facts.required and not row.required else "",  # else Typer says it
    ]
    extra = "; ".join(note for note in notes if note)
    return f"{facts.description}  [{extra}]" if extra else facts.description


@dataclass(frozen=True)
class Given:
    """What the user gave one command.

    Attributes:
        command: its name.
        rows: the flags that it has.
        values: parameter → value; None is a flag not given.
        arguments: the whole command line, to start it again.
        typed: flag → the name by which it was given.
        claims: what was typed that must agree with the configuration.
    """

    command: str
    rows: Sequence[Flag]
    values: Mapping[str, Any]
    arguments: Sequence[str]
    typed: Mapping[str, str] = field(default_factory=dict)
    claims: Sequence[Claim] = ()

    def layer(self) -> Layer:
        """Return the configuration layer of the flags that set a field."""
        layer = Layer()
        for row in self.rows:
            value = self.values[row.parameter]
            if row.path and value is not None:
                _put(layer, row, self.typed.get(row.shown, row.shown), value)
        return layer

    def section(self, section: type[S], **others: Any) -> S:
        """Validate the flags as one flat `section`; `others` are fields that the command made."""
        shown = {row.path: row.shown for row in self.rows if row.path}
        config = build_section(section, {**self.layer().values, **others}, shown)
        for line in check_claims(self.claims, config):
            _note(line)
        return config


def _put(layer: Layer, row: Flag, shown: str, value: Any) -> None:
    """Put a value where `row` says, in `layer` (mutated)."""
    key = tuple(row.path.split("."))
    if row.example:
        for pair in (part for given in value for part in _NEXT_PAIR.split(given)):
            name, equals, column = pair.partition("=")
            if not (name and equals and column):
                raise ConfigError(f"{shown} {pair}: expected {row.metavar}, as in {row.example}.")
            put(layer, (*key, name), column, f"{shown} {name}")
        return
    if row.rest:
        value, *others = value
        if others:
            put(layer, tuple(row.rest.split(".")), others, shown)
    put(layer, key, value, shown)


def _note(line: str) -> None:
    """Say on stderr what is worth a line before there is a screen; of several processes, once."""
    if not is_launched():
        typer.echo(f"note: {line}", err=True)


def _own_config(run: Path, given: Given) -> Path | None:
    """Return the config.yaml of a run to go on with; None where the flags say what it is.

    Raises:
        ConfigError: neither says.
    """
    own = run / "config.yaml"
    if own.is_file():
        return own
    if given.values.get("dataset") is None and given.values.get("model") is None:
        raise ConfigError(
            f"--output-dir {run} is not a run: it has no config.yaml, so --resume has nothing to "
            "go on with. Name another directory, or give all flags of a run that is to begin."
        )
    return None


def read_config(
    given: Given, note: Callable[[str], None] = _note
) -> tuple[TrainConfig, Path | None]:
    """Merge recipe < --set < flags into one validated configuration; return the recipe too.

    Args:
        given: to a command that takes a recipe, `--set` and the flags of `train` or some.
        note: is told what was read as something else, and what was given to no effect and why.

    Raises:
        ConfigError: with all problems found.
    """
    values = given.values
    recipe, positional = values["recipe"], values["recipe_file"]
    if recipe is not None and positional is not None:
        raise ConfigError(
            f"two recipes are given, {positional} and --recipe {recipe}. Give one of them."
        )
    path = recipe or positional
    if path is None and values.get("resume") and values.get("output_dir"):
        path = _own_config(Path(str(values["output_dir"])), given)
    if path is not None:
        path = check_recipe(path, given.command)
    is_run = path is not None and path.name == CONFIG and (path.parent / PLACES).is_file()
    layers = [] if path is None else [read_run(path.parent) if is_run else read_recipe(path)]
    layers.append(read_settings(values["settings"] or []))
    config = build_config([*layers, given.layer()], note)
    if is_run and path is not None:
        check_places(path.parent, config.model_dump(mode="json"))
    for line in check_claims(given.claims, config):
        note(line)
    return config, path
