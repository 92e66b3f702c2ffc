"""Flags that set a field of the configuration: declared by hand, described by the field.

`flag("train.learning_rate")` is a Typer option whose help is the field's description; the command
collects what was given with `given_flags` and hands it to the configuration as one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ftlevel.cli.launch import is_launched
from ftlevel.config import (
    SPECS,
    Layer,
    TrainConfig,
    build_config,
    put,
    read_recipe,
    read_settings,
)
from ftlevel.errors import ConfigError

FLAG_PATHS: dict[str, tuple[str, tuple[str, ...]]] = {}
"""Parameter name → (flag as shown, path of the field that it sets)."""


def flag(path: str, *names: str, panel: str | None = None) -> Any:
    """Declare an option that sets the configuration field at `path`.

    Args:
        path: dotted path of the field; `method.NAME` may be a field of any method.
        names: the flag as Typer declares it; the default is the field's name in kebab case.
        panel: heading under which `--help` shows it.
    """
    key = tuple(path.split("."))
    declared = names or ("--" + key[-1].replace("_", "-"),)
    shown = declared[0].partition("/")[0]
    FLAG_PATHS[shown.removeprefix("--").replace("-", "_")] = (shown, key)
    return typer.Option(
        *declared,
        help=field_at(key).description,
        rich_help_panel=panel,
        show_default=False,
    )


def option_of(section: type[BaseModel], name: str, *flags: str) -> Any:
    """Declare an option that sets the field `name` of a command's own `section`."""
    declared = flags or ("--" + name.replace("_", "-"),)
    return typer.Option(*declared, help=section.model_fields[name].description, show_default=False)


def field_at(key: tuple[str, ...]) -> FieldInfo:
    """Return the configuration field at `key`."""
    if key[0] == "method" and len(key) == 2:
        if key[1] == "kind":
            return FieldInfo(description=f"What is trained: {', '.join(SPECS)}.")
        return next(s.model_fields[key[1]] for s in SPECS.values() if key[1] in s.model_fields)
    model: type[BaseModel] = TrainConfig
    for part in key[:-1]:
        annotation = model.model_fields[part].annotation
        while get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            raise KeyError(".".join(key))
        model = annotation
    return model.model_fields[key[-1]]


def given_flags(parameters: Mapping[str, Any]) -> Layer:
    """Return the configuration layer of the flags in `parameters` that the user gave."""
    layer = Layer()
    for name, value in parameters.items():
        if value is None or name not in FLAG_PATHS:
            continue
        shown, key = FLAG_PATHS[name]
        if name == "dataset" and not isinstance(value, str):  # repeated, it is several sets
            if not value:
                continue
            value, *also = value
            if also:
                put(layer, ("data", "also"), also, shown)
        put(layer, key, value, shown)
    return layer


def read_config(parameters: Mapping[str, Any]) -> tuple[TrainConfig, Path | None]:
    """Merge recipe < --set < flags into one validated configuration; return the recipe too.

    Args:
        parameters: of a command that takes a recipe, `--set` and the flags of `train` or some.

    Raises:
        ConfigError: with all problems found.
    """
    recipe, positional = parameters.get("recipe"), parameters.get("recipe_file")
    if recipe is not None and positional is not None:
        raise ConfigError(
            f"two recipes are given, {positional} and --recipe {recipe}. Give one of them."
        )
    layers = []
    path = recipe or positional
    if path is None and parameters.get("resume") and parameters.get("output_dir"):
        own = Path(str(parameters["output_dir"])) / "config.yaml"
        path = own if own.is_file() else None
    if isinstance(path, Path) and path.is_dir():
        path = _config_of_run(path)
    recipe_path = path if isinstance(path, Path) else None
    if recipe_path is not None:
        layers.append(read_recipe(recipe_path))
    settings = parameters.get("settings")
    layers.append(read_settings(settings if isinstance(settings, list) else []))
    flags = given_flags(parameters)
    _add_precision(flags, parameters)
    _add_columns(flags, parameters.get("column_map"))
    return build_config([*layers, flags], None if is_launched() else _note), recipe_path


def _note(line: str) -> None:
    """Say on stderr what is worth a line before there is a screen; of several processes, once."""
    typer.echo(f"note: {line}", err=True)


def _add_columns(flags: Layer, pairs: object) -> None:
    """Read --map NAME=COLUMN."""
    for name, column in read_columns(pairs if isinstance(pairs, list) else []).items():
        put(flags, ("data", "columns", name), column, f"--map {name}")


def read_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Return name → column of every NAME=COLUMN that was given by --map.

    Raises:
        ConfigError: one is no such pair.
    """
    columns = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"--map {pair}: expected NAME=COLUMN, as in summary=abstract.")
        columns[name] = column
    return columns


def _add_precision(flags: Layer, parameters: Mapping[str, Any]) -> None:
    """Read --bf16 and --fp16, the spellings of transformers' own scripts."""
    given = [name for name in ("bf16", "fp16") if parameters.get(name)]
    if parameters.get("dtype") is not None:
        given.append("dtype")
    if len(given) > 1:
        raise ConfigError(
            f"--{given[0]} and --{given[1]} both set the precision. Give one of them."
        )
    if given and given[0] != "dtype":
        value = {"bf16": "bfloat16", "fp16": "float16"}[given[0]]
        put(flags, ("model", "dtype"), value, f"--{given[0]}")


def _config_of_run(directory: Path) -> Path:
    """Return the config.yaml of a run."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{directory} is a directory without config.yaml, so it is no run.")
    return path
