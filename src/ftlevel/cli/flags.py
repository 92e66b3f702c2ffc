"""Typer options from the table of flags, and configurations from parsed options."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import typer
from typer.core import TyperCommand

from ftlevel.artifacts.files import format_interrupt
from ftlevel.artifacts.paths import PLACES, check_paths, load_run_config
from ftlevel.artifacts.run_directory import CONFIG, get_run_dir, is_run
from ftlevel.cli.spelling import (
    FlagSpec,
    NoOpUse,
    RewrittenArgs,
    build_flag_specs,
    completer,
    resolve_flag_aliases,
    validate_no_ops,
)
from ftlevel.config import (
    Layer,
    TrainConfig,
    build_config,
    build_section,
    load_recipe,
    parse_overrides,
    put,
)
from ftlevel.config.flag import DAILY, GENERAL, FieldMetadata, Flag
from ftlevel.config.flags import flags_of
from ftlevel.config.layers import get_field_path
from ftlevel.config.reading import normalize_task
from ftlevel.config.section import Section
from ftlevel.errors import ConfigError, Interrupted, did_you_mean
from ftlevel.extensions import hooks
from ftlevel.world import is_launched

_WIDEST_NAME = 28  # longest flag on the same line as its help
_ALSO_IN_HELP = ("--help-all", "-h", "--recipe", "--set", "--dry-run")


class FtlevelCommand(TyperCommand):
    """Typer command that accepts aliases of flags and groups its help in panels."""

    specs: ClassVar[Mapping[str, FlagSpec]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace aliases with canonical flags, then parse."""
        if "--help-all" in args and "--help-all" in self.specs:
            ctx.meta["ftlevel.shows_all"] = True
            typer.echo(self.get_help(ctx))
            raise typer.Exit
        rewritten = resolve_flag_aliases(args, self.specs)
        ctx.meta["ftlevel.typed"], ctx.meta["ftlevel.no_ops"] = rewritten.typed, rewritten.no_ops
        try:
            return super().parse_args(ctx, list(rewritten.args))  # the parser empties its argument
        except typer.TyperException as error:
            if hasattr(error, "possibilities"):
                self._explain(error, str(getattr(error, "option_name", "")))
            _name_value(error, rewritten)
            raise

    def _explain(self, error: Any, name: str) -> None:
        """Add a suggestion to the unknown flag's `error`; ConfigError if `name` is a field."""
        has_fields = "--set" in self.specs
        field = get_field_path(name.lstrip("-").replace("-", "_")) if has_fields else ""
        if field:
            raise ConfigError(f"{name} is a field, not a flag: --set {field}=VALUE.") from None
        error.message = f"{error.message}.{did_you_mean(name, self.specs)}"
        error.possibilities = None

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section of help per panel, without rich, whose import is slow."""
        panels: dict[str, list[Any]] = {}
        parameters: list[Any] = self.get_params(ctx)
        for parameter in parameters:
            is_argument = parameter.param_type_name == "argument"
            title = "Arguments" if is_argument else parameter.rich_help_panel or GENERAL
            panels.setdefault(title, []).append(parameter.get_help_record(ctx))
        names = [name for records in panels.values() for name, _ in records]
        column = min(max(map(len, names)), _WIDEST_NAME) + 4
        if DAILY in panels and not ctx.meta.get("ftlevel.shows_all"):
            panels = _common_panels(panels)
        for title, records in panels.items():
            with formatter.section(title):
                for name, text in records:
                    formatter.write(_format_help(name, text, column, formatter.width))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; raises Interrupted on Ctrl-C, which Typer turns into an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(format_interrupt()) from None


def _name_value(error: Any, rewritten: RewrittenArgs) -> None:
    """Raise ConfigError with the invalid value, which Typer omits, if `rewritten` contains it."""
    names = getattr(getattr(error, "param", None), "opts", None) or []
    parts = [part for argument in rewritten.args for part in argument.split("=", 1)]
    positions = [i for i, part in enumerate(parts[:-1]) if part in names]
    if not positions:
        return
    name, value = parts[positions[-1]], parts[positions[-1] + 1]
    message = str(error.message).rstrip(".")
    if "unable to parse" in message:
        expected = "an integer" if "integer" in message else "a number"
        message = f"expected {expected}"
    raise ConfigError(
        f"{rewritten.typed.get(name, name)}: {value!r} cannot be used: "
        f"{message[:1].lower()}{message[1:]}."
    ) from None


def _common_panels(panels: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Returns heading → options of a short `--help`; the last heading names hidden panels."""
    shown = {title: panels[title] for title in ("Arguments", DAILY) if title in panels}
    hidden = {title: records for title, records in panels.items() if title not in shown}
    hidden_records = [record for records in hidden.values() for record in records]
    common = [
        record for record in hidden_records if record[0].split()[0].rstrip(",") in _ALSO_IN_HELP
    ]
    titles = ", ".join(title for title in hidden if title != GENERAL)
    return {**shown, f"{len(hidden_records) - len(common)} more options: {titles}": common}


def _format_help(name: str, text: str, column: int, width: int) -> str:
    """Returns the lines of a flag's help; the description starts at `column`."""
    head = f"  {name} ".ljust(column)
    lines = textwrap.wrap(text, width - column, break_on_hyphens=False, break_long_words=False)
    if len(head) > column or not lines:
        lines.insert(0, "")
    rest = "".join(f"{' ' * column}{line}\n" for line in lines[1:])
    return f"{head}{lines[0]}".rstrip() + "\n" + rest


def check_recipe(path: Path, command: str) -> Path:
    """Returns the YAML file of a recipe or a run; raises ConfigError for any other path."""
    if path.suffix in (".yaml", ".yml"):
        return path
    config_path = path / "config.yaml"
    if config_path.is_file():
        return config_path
    from ftlevel.data.sources.readers import is_data_file_name  # imports numpy

    if path.is_dir():
        hint = ""
        if any(is_data_file_name(entry.name) for entry in path.iterdir()):
            hint = f" Are these examples? ftlevel {command} --dataset {path}"
        raise ConfigError(f"{path} is a directory without config.yaml, so it is not a run.{hint}")
    if is_data_file_name(path.name):
        raise ConfigError(
            f"{path} is a file of examples, and a recipe is a .yaml file. "
            f"Use: ftlevel {command} --dataset {path}"
        )
    if not path.exists():
        candidates = [
            str(p)
            for pattern in ("*.yaml", "*.yml", "*/config.yaml")
            for p in sorted(path.parent.glob(pattern))
        ]
        names = [str(Path(p).parent) if p.endswith("config.yaml") else p for p in candidates]
        raise ConfigError(
            f"{path} is neither a recipe nor the directory of a run."
            f"{did_you_mean(str(path), names)}"
        )
    return path


S = TypeVar("S", bound=Section)
_NEXT_PAIR = re.compile(r",\s*(?=\w+=)")  # of `text=Body,label=Category`
_WIDEST_CHOICES = 20  # characters of a metavar


def add_command(
    app: typer.Typer, name: str, function: Callable[..., None], flags: Sequence[Flag]
) -> None:
    """Add a command and its flags to `app`.

    `function` may have a parameter for each flag, and `inputs` for the whole `CommandInput`.
    """
    rows = flags_of(name, flags)

    class TyperClass(FtlevelCommand):
        specs: ClassVar[Mapping[str, FlagSpec]] = build_flag_specs(name, flags)

    def call(ctx: typer.Context, **values: Any) -> None:
        typed, no_ops = ctx.meta.get("ftlevel.typed", {}), ctx.meta.get("ftlevel.no_ops", [])
        values["inputs"] = CommandInput(name, rows, values.copy(), ctx.obj or [], typed, no_ops)
        function(**{parameter: values[parameter] for parameter in parameters})

    parameters = inspect.signature(function).parameters
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters_of_flags = (_parameter(name, row) for row in rows)
    call.__dict__["__signature__"] = inspect.Signature([context, *parameters_of_flags])
    call.__doc__ = function.__doc__
    app.command(name=name, cls=TyperClass)(call)


def _parameter(command: str, row: Flag) -> inspect.Parameter:
    metadata = row.metadata(command)
    default = metadata.default if row.value is not None else None
    if metadata.type is bool and row.value is not None:
        default = False
    kwargs: dict[str, Any] = {
        "help": _help_of(metadata, row),
        "metavar": row.names if row.is_argument else row.metavar or _short_choices(metadata),
        "min": metadata.minimum,
        "rich_help_panel": row.panel or None,
        "show_default": bool(default is not None and default is not False),
        "autocompletion": completer(row, metadata),
    }
    info = (
        typer.Argument(**kwargs)
        if row.is_argument
        else typer.Option(*row.typer_names(metadata.type is bool), **kwargs)
    )
    has_default = row.required or default is not None
    return inspect.Parameter(
        row.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[metadata.type if has_default else metadata.type | None, info],
        default=inspect.Parameter.empty if row.required else default,
    )


def _short_choices(metadata: FieldMetadata) -> str | None:
    choices = "|".join(metadata.choices)
    return choices if choices and len(choices) <= _WIDEST_CHOICES else None


def _help_of(metadata: FieldMetadata, row: Flag) -> str:
    """Returns a flag's description, followed by choices and default that it does not mention."""
    if row.value is not None:
        return metadata.description
    is_shown = _short_choices(metadata) or all(c in metadata.description for c in metadata.choices)
    extras = [
        "" if is_shown else ", ".join(metadata.choices),
        f"default: {metadata.default}" if metadata.default else "",
        "required" if metadata.required and not row.required else "",  # otherwise Typer shows it
    ]
    extra = "; ".join(filter(None, extras))
    return f"{metadata.description}  [{extra}]" if extra else metadata.description


@dataclass(frozen=True)
class CommandInput:
    """Parsed command line of one command.

    Attributes:
        values: flag values by parameter of the function; None if not set.
        args: whole command line, with which the command can be started again.
        typed: canonical flag → name that the user typed.
        no_ops: flag values that change nothing and that the configuration must not contradict.
    """

    command: str
    rows: Sequence[Flag]
    values: Mapping[str, Any]
    args: Sequence[str]
    typed: Mapping[str, str]
    no_ops: Sequence[NoOpUse]

    def layer(self, task: str = "") -> Layer:
        """Returns the flag values as a layer; the field that some flags set depends on `task`."""
        layer = Layer()
        for row in self.rows:
            value = self.values[row.parameter]
            if row.path and value is not None:
                path = row.by_task.get(task, row.path)
                example = row.metadata(self.command).example
                _put(layer, row, path, self.typed.get(row.name, row.name), value, example)
        return layer

    def section(self, section: type[S], **fields: Any) -> S:
        """Returns an instance of the class `section` from the flag values and other `fields`."""
        shown = {row.path: row.name for row in self.rows if row.path}
        config = build_section(section, {**self.layer().values, **fields}, shown)
        for line in validate_no_ops(self.no_ops, config):
            print_note(line)
        return config


def _put(layer: Layer, row: Flag, path: str, shown: str, value: Any, example: str) -> None:
    """Set the field `path` of `layer` (modified) to `value`, which was given by the flag `row`.

    `shown` is the flag as typed. If `example` is not empty, `value` is NAME=VALUE pairs for a dict.
    """
    key = tuple(path.split("."))
    if example:
        for pair in (part for values in value for part in _NEXT_PAIR.split(values)):
            name, equals, column = pair.partition("=")
            if not (name and equals and column):
                raise ConfigError(f"{shown} {pair}: expected {row.metavar}, as in {example}.")
            put(layer, (*key, name), column, f"{shown} {name}")
        return
    if row.rest:
        value, *additional = value
        if additional:
            put(layer, tuple(row.rest.split(".")), additional, shown)
    put(layer, key, value, shown)


def print_note(message: str) -> None:
    """Print a note to stderr, except in a process that a launcher such as torchrun started."""
    if not is_launched():
        typer.echo(f"note: {message}", err=True)


def _get_run_config(run: Path, inputs: CommandInput) -> Path | None:
    config_path = run / "config.yaml"
    if config_path.is_file():
        return config_path
    if inputs.values.get("dataset") is None and inputs.values.get("model") is None:
        raise ConfigError(
            f"--output-dir {run} is not a run: it contains no config.yaml. Choose another "
            f"directory, or drop --resume to start a new run."
        )
    return None


def _get_adapter_task(name: str) -> str:
    """Returns the task of the run at `name`, or of the run that contains it; "" without a run."""
    path = Path(name).expanduser()
    run = path if is_run(path) else get_run_dir(path)
    return str(load_recipe(run / CONFIG).values.get("task") or "") if run and is_run(run) else ""


def add_flag_layers(
    layers: Sequence[Layer], inputs: CommandInput, note: Callable[[str], None]
) -> list[Layer]:
    """Returns `layers`, a layer of `--set`, and one of the flags, which depends on the task."""
    layers = [*layers, parse_overrides(inputs.values["settings"] or [])]
    tasks = [inputs.values["task"], *(layer.values.get("task") for layer in reversed(layers))]
    adapter = inputs.values.get("adapter")
    if adapter and not any(tasks) and (task := _get_adapter_task(adapter)):
        tasks, layers = [task], [Layer({"task": task}), *layers]
    task = normalize_task(str(next(filter(None, tasks), "")))
    flags = inputs.layer(task)
    for complete in hooks("complete_flags"):
        for line in complete(task, flags.values, inputs.typed):
            note(line)
    return [*layers, flags]


def read_config(
    inputs: CommandInput, note: Callable[[str], None] = print_note
) -> tuple[TrainConfig, Path | None]:
    """Returns the configuration merged from recipe < --set < flags, and the recipe's path or None.

    `note` is called with a message for each alias and each value that changes nothing.
    """
    values = inputs.values
    recipe, positional = values["recipe"], values["recipe_file"]
    if recipe is not None and positional is not None:
        raise ConfigError(
            f"two recipes are given, {positional} and --recipe {recipe}. Use one of them."
        )
    path = recipe or positional
    if path is None and values.get("resume") and values.get("output_dir"):
        path = _get_run_config(Path(str(values["output_dir"])).expanduser(), inputs)
    if path is not None:
        path = check_recipe(path, inputs.command)
    is_run = path is not None and path.name == CONFIG and (path.parent / PLACES).is_file()
    layers = [] if path is None else [load_run_config(path.parent) if is_run else load_recipe(path)]
    config = build_config(add_flag_layers(layers, inputs, note), note)
    if is_run and path is not None:
        check_paths(path.parent, config.model_dump(mode="json"))
    for line in validate_no_ops(inputs.no_ops, config):
        note(line)
    return config, path
