"""`ftlevel recipes`: list, show and copy recipes, and convert configurations of other tools."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import typer

from ftlevel._version import __version__
from ftlevel.cli.flags import CommandInput, add_command, read_config
from ftlevel.cli.spelling import build_flag_specs, resolve_flag_aliases
from ftlevel.config import TrainConfig
from ftlevel.config.flags import FLAGS
from ftlevel.config.layers import read_yaml
from ftlevel.errors import ConfigError, did_you_mean, join_names
from ftlevel.extras.other_tools.other_tools import LLAMA_FACTORY, convert_keys, detect_tool

_ACTIONS = ("list", "show", "copy", "convert")
_NO_COUNTERPART = "ftlevel has nothing like it"


def recipes(action: str, file: Path | None, target: Path | None, *, as_json: bool) -> None:
    """List, show, copy or convert recipes.

    `list` shows recipes of this directory and those shipped with ftlevel; `copy NAME [TO]` never
    overwrites. `convert FILE` prints a configuration of Axolotl, LLaMA-Factory, ms-swift or TRL as
    a recipe, and names the keys without a counterpart.
    """
    if action == "list":
        _list(as_json)
        return
    if action not in _ACTIONS:
        hint = did_you_mean(action, _ACTIONS)
        raise ConfigError(f"{action!r} is not known. Expected {join_names(_ACTIONS)}.{hint}")
    if file is None:
        raise ConfigError(f"there is nothing to {action}. Use: ftlevel recipes {action} FILE")
    if target is not None and action != "copy":
        raise ConfigError(f"{target} is one too many: only copy writes a file.")
    if action == "convert":
        convert(file)
        return
    path = _find(file)
    text = path.read_text(encoding="utf-8")
    if action == "copy":
        target = _copy(path, text, target or Path(path.name))
        said = {"recipe": str(path), "copied_to": str(target)}
        typer.echo(json.dumps(said) if as_json else f"wrote {target}. Then: ftlevel train {target}")
    elif as_json:
        typer.echo(json.dumps({"recipe": str(path), "text": text}))
    else:
        typer.echo(text, nl=False)


def shipped() -> list[Path]:
    """Return the recipes that come with ftlevel: in the package, or beside src in a checkout."""
    package = Path(__file__).resolve().parents[1]
    places = (package / "recipes", package.parents[1] / "recipes")
    return sorted(next((p for p in places if p.is_dir()), package).glob("*.yaml"))


def _list(as_json: bool) -> None:
    own = {path.resolve(): path for path in _known()}
    theirs = [path for path in shipped() if path.resolve() not in own]
    found = [(str(path), path) for path in own.values()] + [(path.stem, path) for path in theirs]
    if as_json:
        rows = [{"name": name, "path": str(path), "about": _about(path)} for name, path in found]
        typer.echo(json.dumps({"recipes": rows}))
        return
    width = max((len(name) for name, _ in found), default=0)
    for name, path in found:
        typer.echo(f"{name.ljust(width)}  {_about(path)}".rstrip())


def _about(path: Path) -> str:
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first[1:].strip() if first.startswith("#") else ""


def _known() -> list[Path]:
    files = [path for where in (".", "recipes") for path in Path(where).glob("*.y*ml")]
    return sorted(filter(_is_recipe, files))


def _is_recipe(path: Path) -> bool:
    """Return whether a YAML file has a section of ftlevel's."""
    try:
        return not TrainConfig.model_fields.keys().isdisjoint(read_yaml(path)[0])
    except (ConfigError, OSError):
        return False


def _find(file: Path) -> Path:
    """Return the path of a recipe given by path or name; raise ConfigError if there is none."""
    known = [*_known(), *shipped()]
    found = [path for path in known if file in (path, Path(path.name), Path(path.stem))]
    if not file.is_file() and not found:
        near = did_you_mean(str(file), [path.stem for path in known])
        raise ConfigError(f"there is no recipe {file}.{near} See: ftlevel recipes list")
    read_yaml(path := file if file.is_file() else found[0])
    return path


def _copy(path: Path, text: str, target: Path) -> Path:
    target = target / path.name if target.is_dir() else target
    try:
        with target.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise ConfigError(
            f"{target} already exists and is not changed. Choose another: "
            f"ftlevel recipes copy {path.stem} {target.with_stem(target.stem + '-2')}"
        ) from None
    except FileNotFoundError:
        raise ConfigError(f"{target.parent} does not exist. Create the directory first.") from None
    return target


def convert(file: Path) -> None:
    """Print the configuration of another tool as a recipe, with comments on keys left out."""
    import yaml

    values, _ = read_yaml(file)
    tool = detect_tool(values)
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
    """Return the arguments of each key with a counterpart, and the reason for each other key."""
    readings = build_flag_specs("train", FLAGS)
    typed: dict[str, list[str]] = {}
    lost: dict[str, str] = {}
    for key, words in convert_keys(values):
        name = (words or [f"--{key}"])[0].replace("_", "-")
        if name not in readings:
            lost[key] = _NO_COUNTERPART
        elif not words:
            lost[key] = readings[name].answer or _NO_COUNTERPART
        else:
            try:
                resolve_flag_aliases([*itertools.chain(*typed.values()), *words], readings)
            except ConfigError as error:
                lost[key] = _reason(error)
            else:
                typed[key] = words
    return typed, lost


def _reason(error: ConfigError) -> str:
    return error.problems[-1].partition(": ")[2] or error.problems[-1]


def _resolve(typed: dict[str, list[str]], lost: dict[str, str]) -> TrainConfig:
    """Return the configuration of the keys; moves keys that cause errors to `lost` (mutated)."""
    found: list[TrainConfig] = []

    def command(given: CommandInput) -> None:
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
        key = next(
            (k for k, left in fewer if left is None or len(left.problems) < len(error.problems)),
            None,
        )
        if key is None:
            raise error
        lost[key] = _reason(error)
        del typed[key]
    for line in notes:
        typer.echo(f"note: {line}", err=True)
    return found[-1]
