"""Resolve the local files of a run after it has been moved.

config.yaml contains absolute paths; places.json contains paths relative to the run directory, so
that a folder with run, model and data can be moved. The first existing path is used. If both paths
of the base model exist, the one with the run's weights is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import base_fingerprint, read_plain, write_json
from ftlevel.artifacts.run_directory import CONFIG, ORIGIN, RunDirectory
from ftlevel.config import IN_MEMORY, Layer, read_recipe
from ftlevel.config.preference import NO_REFERENCE, START
from ftlevel.errors import ConfigError, join_names

PLACES = "places.json"

_FIELDS = {
    "model.name_or_path": "--model",
    "data.dataset": "--dataset",
    "data.also": "--dataset",
    "data.validation_file": "--validation-file",
    "data.qrels": "--qrels",
    "data.corpus": "--corpus",
    "data.chat_template": "--chat-template",
    "preference.reference": "--reference",
    "distillation.teacher": "--teacher",
}
"""Dotted field that may contain a local path → the flag that sets it."""

DATA_PATHS = ("data.dataset", "data.also", "data.validation_file", "data.qrels", "data.corpus")
"""Fields with the paths of the data."""


def make_paths_absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` of a configuration with local paths made absolute."""
    return _with_places(values, lambda _, place: str(Path(place).expanduser().absolute()))


def write_relative_paths(directory: RunDirectory, values: Mapping[str, Any]) -> None:
    """Write places.json: absolute path in config.yaml → path relative to the run."""
    relative_paths: dict[str, str] = {}

    def note(_: str, path: str) -> str:
        relative_paths[path] = relative_path(Path(path), directory.path)
        return path

    _with_places(make_paths_absolute(values), note)
    write_json(
        directory.path / PLACES,
        {absolute: path for absolute, path in relative_paths.items() if path},
    )


def relative_path(path: Path, directory: Path) -> str:
    """Returns `path` relative to `directory`; empty if there is none, as between drives."""
    path = path.expanduser().absolute()
    try:
        return os.path.relpath(path.parent.resolve() / path.name, directory.resolve())
    except ValueError:
        return ""


def resolve_relative(relative: str, directory: Path) -> Path:
    """Returns the path that is `relative` to `directory`."""
    return Path(os.path.normpath(directory.resolve() / relative))


def read_run(directory: Path) -> Layer:
    """Load config.yaml of a run, with the current paths of its files.

    Missing files keep their recorded path; see `check_paths`. Raises ConfigError if unreadable.
    """
    layer = read_recipe(directory / CONFIG)
    relative, weights = _read_json(directory / PLACES), _weights_of(directory)

    def now(field: str, recorded: str) -> str:
        existing = [path for path in _candidates(recorded, relative, directory) if _is_there(path)]
        if field == "model.name_or_path" and weights is not None and len(existing) > 1:
            existing = [path for path in existing if base_fingerprint(path) == weights] or existing
        return str(existing[0]) if existing else recorded

    return Layer(_with_places(layer.values, now), layer.origins)


def check_paths(directory: Path, values: Mapping[str, Any], names: Sequence[str] = ()) -> None:
    """Raise ConfigError, with a line per file, if files in `values` are missing.

    Only the given dotted `names` are checked; all if empty.
    """
    relative, problems = _read_json(directory / PLACES), []

    def look(field: str, recorded: str) -> str:
        if names and field not in names:
            return recorded
        if recorded == IN_MEMORY:
            problems.append(
                f"{directory} was trained on rows in memory, which are not saved. Pass --dataset "
                f"FILE, or the same rows in Python."
            )
        elif recorded in relative and not _is_there(Path(recorded)):
            tried = [str(path) for path in _candidates(recorded, relative, directory)]
            problems.append(
                f"{directory}: {field} is not where it was, and was looked for at "
                f"{join_names(tried)}. Name its place: {_FIELDS[field]} PATH."
            )
        return recorded

    _with_places(values, look, every=True)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _candidates(path: str, relative: Mapping[str, str], directory: Path) -> list[Path]:
    moved = [resolve_relative(relative[path], directory)] if path in relative else []
    return list(dict.fromkeys([*moved, Path(path)]))


def _with_places(
    values: Mapping[str, Any], change: Callable[[str, str], str], *, every: bool = False
) -> dict[str, Any]:
    """Returns `values` with `change` applied to local paths; with `every`, to Hub names too."""
    changed = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}

    def new(field: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [new(field, item) for item in value]
        return change(field, value) if every or _is_path(field, value) else value

    for field, section, name in _parts():
        fields = changed.get(section)
        if isinstance(fields, dict) and fields.get(name):
            fields[name] = new(field, fields[name])
    return changed


def _parts() -> Iterator[tuple[str, str, str]]:
    for field in _FIELDS:
        section, _, name = field.partition(".")
        yield field, section, name


def _is_path(field: str, value: str) -> bool:
    """Whether `value` is a local path: it exists or is absolute."""
    if value == IN_MEMORY or value.startswith(("builtin:", "hf://")):
        return False
    path = Path(value).expanduser()
    if str(path.parent) in ("/dev/fd", "/proc/self/fd"):  # process substitution of the shell
        return False
    if field == "data.chat_template" and path.name == value and not path.suffix:
        return False  # name of a built-in template
    if field == "preference.reference" and value in (START, NO_REFERENCE):
        return False
    return path.is_absolute() or _is_there(path)


def _is_there(path: Path) -> bool:
    return path.exists() or bool(glob(str(path), recursive=True))  # noqa: PTH207 - as match_files


def _read_json(path: Path) -> dict[str, Any]:
    """Load the object in the file; empty if the file does not exist."""
    try:
        content = json.loads(read_plain(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}). Is the copy incomplete?") from None
    return content if isinstance(content, dict) else {}


def _weights_of(directory: Path) -> str | None:
    """Returns the fingerprint of the weights that the run had at the start; None if unknown."""
    return _read_json(directory / "checkpoints" / ORIGIN).get("model.fingerprint")
