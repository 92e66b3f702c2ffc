"""`ftlevel recipes`: list, show and copy recipes, and convert configurations of other tools."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote

import typer

from ftlevel.config import TrainConfig
from ftlevel.config.layers import load_yaml_file
from ftlevel.errors import ConfigError, did_you_mean, join_names
from ftlevel.extensions import hooks

_ACTIONS = ("list", "show", "copy", "convert")


def recipes(action: str, file: Path | None, target: Path | None, *, as_json: bool) -> None:
    """List, show, copy or convert recipes.

    `list` shows recipes of this directory and those shipped with ftlevel; `copy NAME [TO]` never
    overwrites. `convert FILE` prints a configuration of Axolotl, LLaMA-Factory, ms-swift, TRL or
    verl as a recipe, and names the keys without a counterpart.
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
        raise ConfigError(f"unexpected argument {target}: only copy writes a file.")
    if action == "convert":
        _convert(file)
        return
    path = _find(file)
    text = path.read_text(encoding="utf-8")
    if action == "copy":
        target = _copy(path, text, target or Path(path.name))
        typer.echo(
            json.dumps({"recipe": str(path), "copied_to": str(target)})
            if as_json
            else f"wrote {target}. Then: ftlevel train {quote(str(target))}"
        )
    elif as_json:
        typer.echo(json.dumps({"recipe": str(path), "text": text}))
    else:
        typer.echo(text, nl=False)


def shipped() -> list[Path]:
    """Returns the paths of ftlevel's recipes: in the package or, in a git checkout, beside src."""
    package = Path(__file__).resolve().parents[1]
    folders = (package / "recipes", package.parents[1] / "recipes")
    return sorted(next((p for p in folders if p.is_dir()), package).glob("*.yaml"))


def _list(as_json: bool) -> None:
    local = {path.resolve(): path for path in _local_recipes()}
    shipped_paths = [path for path in shipped() if path.resolve() not in local]
    entries = [(str(path), path) for path in local.values()]
    entries += [(path.stem, path) for path in shipped_paths]
    if as_json:
        rows = [{"name": name, "path": str(path), "about": _about(path)} for name, path in entries]
        typer.echo(json.dumps({"recipes": rows}))
        return
    width = max((len(name) for name, _ in entries), default=0)
    for name, path in entries:
        typer.echo(f"{name.ljust(width)}  {_about(path)}".rstrip())


def _about(path: Path) -> str:
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first[1:].strip() if first.startswith("#") else ""


def _local_recipes() -> list[Path]:
    files = [path for where in (".", "recipes") for path in Path(where).glob("*.y*ml")]
    return sorted(filter(_is_recipe, files))


def _is_recipe(path: Path) -> bool:
    """Returns whether a YAML file has a top-level key of ftlevel's recipes."""
    try:
        return not TrainConfig.model_fields.keys().isdisjoint(load_yaml_file(path)[0])
    except (ConfigError, OSError):
        return False


def _find(file: Path) -> Path:
    recipes = [*_local_recipes(), *shipped()]
    matches = [path for path in recipes if file in (path, Path(path.name), Path(path.stem))]
    if not file.is_file() and not matches:
        hint = did_you_mean(str(file), [path.stem for path in recipes])
        raise ConfigError(f"there is no recipe {file}.{hint} See: ftlevel recipes list")
    load_yaml_file(path := file if file.is_file() else matches[0])
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


def _convert(file: Path) -> None:
    tools: list[str] = []
    for convert in hooks("convert_recipe"):
        if not (supported := convert(file)):
            return
        tools += supported
    raise ConfigError(
        f"{file} is not a configuration of {join_names(tools)}. If it is a recipe: "
        f"ftlevel train {file}"
    )
