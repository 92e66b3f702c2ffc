"""`ftlevel recipes`: list and show recipes, and convert those of other tools."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import typer

from ftlevel._version import __version__
from ftlevel.cli.flags import Given, add_command, read_config
from ftlevel.cli.typed.spelling import readings_of, rewrite
from ftlevel.config import TrainConfig
from ftlevel.config.flags import FLAGS
from ftlevel.config.layers import read_yaml
from ftlevel.config.other_tools.recipes import LLAMA_FACTORY, tool_of, typed_keys
from ftlevel.errors import ConfigError, did_you_mean

_NO_COUNTERPART = "ftlevel has nothing like it"


def recipes(action: str, file: Path | None) -> None:
    """List and show recipes, and convert those of other tools.

    ACTION is list, show or convert. `convert FILE` prints a file of Axolotl, LLaMA-Factory,
    ms-swift or TRL as a recipe, and names every key that has no counterpart.
    """
    if action == "list":
        for path in _known():
            typer.echo(path)
        return
    if action not in ("show", "convert"):
        hint = did_you_mean(action, ("list", "show", "convert"))
        raise ConfigError(f"{action!r} is not known. Expected list, show or convert.{hint}")
    if file is None:
        raise ConfigError(f"there is nothing to {action}. Use: ftlevel recipes {action} FILE")
    if action == "show":
        _show(file)
    else:
        convert(file)


def _known() -> list[Path]:
    return sorted(path for where in (".", "recipes") for path in Path(where).glob("*.y*ml"))


def _show(file: Path) -> None:
    found = [path for path in _known() if file in (path, Path(path.name), Path(path.stem))]
    read_yaml(path := file if file.is_file() else [*found, file][0])
    typer.echo(path.read_text(encoding="utf-8"), nl=False)


def convert(file: Path) -> None:
    """Print the file of another tool as a recipe, with what could not be taken over.

    Raises:
        ConfigError: it is no file of a tool that is known, or what it says does not go together.
    """
    import yaml

    values, _ = read_yaml(file)
    tool = tool_of(values)
    if not tool:
        raise ConfigError(
            f"{file} is no configuration of Axolotl, LLaMA-Factory, ms-swift or TRL. If it is a "
            f"recipe: ftlevel train {file}"
        )
    typed, lost = _sort_keys(values)
    config = _resolve(typed, lost)
    data = config.data
    if tool == LLAMA_FACTORY and "/" not in data.dataset and not Path(data.dataset).suffix:
        lost["dataset"] = (
            "names of dataset_info.json mean nothing here. Name the files of "
            f"{', '.join([data.dataset, *data.also])}"
        )
    typer.echo(f"# {file.name} of {tool}, converted by ftlevel {__version__}.")
    for key, reason in lost.items():
        typer.echo(f"# Not taken over: {key}: {reason}")
        typer.echo(f"note: not taken over: {key}: {reason}", err=True)
    own = config.model_dump(mode="json", exclude_unset=True)
    typer.echo(yaml.safe_dump(own, sort_keys=False, allow_unicode=True), nl=False)


def _sort_keys(values: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the keys that have a counterpart, with what is typed for it, and why others have none.

    Args:
        values: of the file.
    """
    readings = readings_of("train", FLAGS)
    typed: dict[str, list[str]] = {}
    lost: dict[str, str] = {}
    for key, words in typed_keys(values):
        name = (words or [f"--{key}"])[0].replace("_", "-")
        if name not in readings:
            lost[key] = _NO_COUNTERPART
        elif not words:
            lost[key] = readings[name].answer or _NO_COUNTERPART
        else:
            try:
                rewrite([*itertools.chain(*typed.values()), *words], readings)
            except ConfigError as error:
                lost[key] = _reason(error)
            else:
                typed[key] = words
    return typed, lost


def _reason(error: ConfigError) -> str:
    return error.problems[-1].partition(": ")[2] or error.problems[-1]


def _resolve(typed: dict[str, list[str]], lost: dict[str, str]) -> TrainConfig:
    """Return the configuration of these keys; one that cannot be had goes to `lost` (mutated).

    Raises:
        ConfigError: leaving out single keys does not help.
    """
    found: list[TrainConfig] = []

    def command(given: Given) -> None:
        found.append(read_config(given, notes.append)[0])

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    add_command(app, "train", command, FLAGS)

    def problem_of(without: str) -> ConfigError | None:
        notes.clear()
        words = (words for key, words in typed.items() if key != without)
        try:
            app(args=[*itertools.chain(*words)], standalone_mode=False)
        except ConfigError as error:
            return error
        return None

    notes: list[str] = []
    while (error := problem_of("")) is not None:
        fewer = ((key, problem_of(key)) for key in list(typed))
        key = next((k for k, left in fewer if left is None
                    or len(left.problems) < len(error.problems)), None)  # fmt: skip
        if key is None:
            raise error
        lost[key] = _reason(error)
        del typed[key]
    for line in notes:
        typer.echo(f"note: {line}", err=True)
    return found[-1]
