"""Resolve the local files of a run after it has been moved.

config.yaml contains absolute paths; places.json contains paths relative to the run directory, so
that a folder with run, model and data can be moved. The first existing path is used; for the base
model, the one with the weights of the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import base_fingerprint, load_json, write_json
from ftlevel.artifacts.run_directory import CHECKPOINTS, CONFIG, IDENTITY, RunDirectory
from ftlevel.config import IN_MEMORY, Layer, load_recipe
from ftlevel.config.train import SECTIONS
from ftlevel.errors import ConfigError, join_names

PLACES = "places.json"

_FIELDS = {
    "model.name_or_path": "--model",
    "model.adapter": "--adapter",
    "data.dataset": "--dataset",
    "data.also": "--dataset",
    "data.validation_file": "--validation-file",
    "data.qrels": "--qrels",
    "data.corpus": "--corpus",
    "data.chat_template": "--chat-template",
    "distillation.teacher": "--teacher",
    **{f"{n}.{field}": flag for n, own in SECTIONS.items() for field, flag in own.paths.items()},
}
"""Dotted field that may contain a local path → the flag that sets it."""

DATA_PATHS = ("data.dataset", "data.also", "data.validation_file", "data.qrels", "data.corpus")
"""Fields with the paths of the data."""


def make_paths_absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` of a configuration with local paths made absolute."""
    return _map_paths(values, lambda _, place: str(Path(place).expanduser().absolute()))


def save_relative_paths(run_dir: RunDirectory, values: Mapping[str, Any]) -> None:
    """Save places.json: absolute path in `values` (config.yaml) → its path relative to the run."""
    relative_paths: dict[str, str] = {}

    def collect(_: str, path: str) -> str:
        relative_paths[path] = relative_path(Path(path), run_dir.path)
        return path

    _map_paths(make_paths_absolute(values), collect)
    write_json(
        run_dir.path / PLACES, {absolute: path for absolute, path in relative_paths.items() if path}
    )


def relative_path(path: Path, start: Path) -> str:
    """Returns `path` relative to `start`; empty if there is none, as between Windows drives."""
    path = path.expanduser().absolute()
    try:
        return os.path.relpath(path.parent.resolve() / path.name, start.resolve())
    except ValueError:
        return ""


def resolve_relative(relative: str, start: Path) -> Path:
    """Returns the absolute path of `relative`, a path relative to `start`."""
    return Path(os.path.normpath(start.resolve() / relative))


def load_run_config(run_dir: Path) -> Layer:
    """Load config.yaml of a run; paths of files that were moved with the run are updated."""
    layer = load_recipe(run_dir / CONFIG)
    relative = load_json(run_dir / PLACES)
    weights = load_json(run_dir / CHECKPOINTS / IDENTITY).get("model.fingerprint")

    def get_current_path(field: str, original: str) -> str:
        existing = [path for path in _candidates(original, relative, run_dir) if _exists(path)]
        if field == "model.name_or_path" and weights is not None and len(existing) > 1:
            existing = [path for path in existing if base_fingerprint(path) == weights] or existing
        return str(existing[0]) if existing else original

    return replace(layer, values=_map_paths(layer.values, get_current_path))


def check_paths(run_dir: Path, values: Mapping[str, Any], names: Sequence[str] = ()) -> None:
    """Raise ConfigError, with a line per file, if files in `values` are missing.

    Only the fields in `names`, such as `data.dataset`, are checked; all of them if it is empty.
    """
    relative, missing = load_json(run_dir / PLACES), []

    def check(field: str, original: str) -> str:
        if names and field not in names:
            return original
        if original == IN_MEMORY:
            missing.append(
                f"{run_dir} was trained on rows in memory, which are not saved. Pass --dataset "
                f"FILE, or the same rows in Python."
            )
        elif original in relative and not _exists(Path(original)):
            paths = [str(path) for path in _candidates(original, relative, run_dir)]
            missing.append(
                f"{run_dir}: {field} is not where it was, and was looked for at "
                f"{join_names(paths)}. Pass its path: {_FIELDS[field]} PATH."
            )
        return original

    _map_paths(values, check, include_hub=True)
    if missing:
        raise ConfigError(list(dict.fromkeys(missing)))


def _candidates(path: str, relative: Mapping[str, str], run_dir: Path) -> list[Path]:
    new_paths = [resolve_relative(relative[path], run_dir)] if path in relative else []
    return list(dict.fromkeys([*new_paths, Path(path)]))


def _map_paths(
    values: Mapping[str, Any], function: Callable[[str, str], str], *, include_hub: bool = False
) -> dict[str, Any]:
    """Returns `values` with local paths (and Hub names) replaced by `function(field, path)`."""
    result = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}

    def map_path(field: str, path: str) -> str:
        return function(field, path) if include_hub or _is_path(field, path) else path

    def map_value(field: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [map_value(field, item) for item in value]
        section, _, name = field.partition(".")
        if own := SECTIONS.get(section):
            return own.map_path(name, value, partial(map_path, field))
        return map_path(field, value)

    for field in _FIELDS:
        section, _, name = field.partition(".")
        fields = result.get(section)
        if isinstance(fields, dict) and fields.get(name):
            fields[name] = map_value(field, fields[name])
    return result


def _is_path(field: str, value: str) -> bool:
    if value == IN_MEMORY or value.startswith(("builtin:", "hf://")):
        return False
    path = Path(value).expanduser()
    if str(path.parent) in ("/dev/fd", "/proc/self/fd"):  # process substitution of the shell
        return False
    if field == "data.chat_template" and path.name == value and not path.suffix:
        return False  # name of a built-in template
    return path.is_absolute() or _exists(path)


def _exists(path: Path) -> bool:
    return path.exists() or bool(glob(str(path), recursive=True))  # noqa: PTH207 - as match_files
