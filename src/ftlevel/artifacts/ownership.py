"""Track which files of a run directory belong to the run; only these are replaced or deleted.

A marker is written first. `--overwrite` moves the old run's files aside, deletes them once the new
run has a checkpoint or finishes, and restores them if it fails earlier. Other files are kept.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.files import read_plain, write_json
from ftlevel.errors import ConfigError

MARKER = ".ftlevel.json"
CONFIG, SUMMARY, METRICS, README = "config.yaml", "summary.json", "metrics.jsonl", "README.md"
REPORT, ANSWERS, ROLLOUTS = "report.html", "validation.jsonl", "rollouts.jsonl"
ADAPTER, CHECKPOINTS = "adapter", "checkpoints"
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_FILES = (CONFIG, SUMMARY, METRICS, README, REPORT, ANSWERS, ROLLOUTS, "places.json")
OWN = (*_FILES, ADAPTER, CHECKPOINTS, "base", *_TRACKERS)
"""Names of everything that a run writes into its directory, except the marker."""

_ASIDE, _KEPT = ".replaced", "kept"

_IN_CHECKPOINTS = re.compile(
    r"(origin|base)\.json|(changes|notes)\.jsonl|\.seen-.*|\.[^/]*\.partial(/.*)?|"
    r"((checkpoint|rejected|best)-\d+(-\d+)?/(README\.md|.*config\.json|.*\.safetensors|"
    r".*\.index\.json|(optimizer|scheduler|scaler)\.pt|rng_state\w*\.pth|trainer_state\.json|"
    r"training_args\.bin|(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|spiece)"
    r".*|losses\.json|adalora_ranks\.json|stream\.(json|arrow)|manifest\.json|\..*\.partial))"
)
"""Files that an interrupted run may have left in its checkpoints directory."""


def mark(directory: Path) -> None:
    """Write the marker of a new run into `directory`."""
    write_json(directory / MARKER, {"run": uuid.uuid4().hex})


def mark_end(directory: Path) -> None:
    """Record the files of a finished run; files found later are of other origin."""
    run = (_read_marker(directory) or {}).get("run", uuid.uuid4().hex)
    write_json(directory / MARKER, {"run": run, "files": sorted(_files(directory))})


def mark_resumed(directory: Path) -> None:
    """Record that a finished run resumes: only the adapter's files stay listed."""
    marker = _read_marker(directory)
    if marker and (files := marker.pop("files", None)) is not None:
        marker["adapter"] = [name for name in files if name.startswith(f"{ADAPTER}/")]
        write_json(directory / MARKER, marker)


def mark_end_once(directory: Path) -> None:
    """Record the files of a finished run, if a kill prevented that."""
    if "files" not in (_read_marker(directory) or {}):
        mark_end(directory)


def is_free(directory: Path) -> bool:
    """Whether `directory` contains nothing, except for an incomplete marker."""
    return all(path.name == f".{MARKER}.partial" for path in directory.iterdir())


def is_run(directory: Path) -> bool:
    """Whether `directory` contains the marker of a run."""
    return _read_marker(directory) is not None


def check_replaceable(directory: Path) -> None:
    """Raise ConfigError unless `directory` has a marker.

    Links and home, root and git directories are refused too.
    """
    where, reason = directory.resolve(), None
    if directory.is_symlink():
        reason = f"it is a link to {directory.readlink()}"
    elif where == where.parent:
        reason = "it is the root of the file system"
    elif where == Path.home().resolve():
        reason = "it is your home directory"
    elif (where / ".git").exists():
        reason = "it is the root of a git work tree"
    elif not is_run(directory):
        reason = f"it is not a run of ftlevel (no {MARKER})"
    if reason is not None:
        raise ConfigError(
            f"--overwrite {directory}: {reason}, so it is not deleted. Choose another directory."
        )


def forget_adapter(directory: Path) -> None:
    """Delete the adapter of an earlier end of the run; other files in it are kept."""
    move_foreign_files(directory, f"{ADAPTER}/")
    adapter = directory / ADAPTER
    if adapter.is_symlink():
        adapter.unlink()
    elif adapter.exists():
        shutil.rmtree(adapter)


def set_aside(directory: Path) -> list[str]:
    """Move the files of the run in `directory` aside; return a line for each file of other origin.

    This may be repeated after a kill: a new run without results is deleted, and the run before it
    stays aside.
    """
    aside = directory / _ASIDE
    before, marker = _read_marker(aside), _read_marker(directory)
    moved = move_foreign_files(directory)
    is_begun = before is not None and before["run"] != (marker or {}).get("run")
    if aside.is_dir() and (before is None or (is_begun and _has_result(directory))):
        shutil.rmtree(aside)
        is_begun = False
    if is_begun:  # a new run that was killed
        _delete_run(directory)
    else:
        aside.mkdir(exist_ok=True)
        write_json(aside / MARKER, marker)
        for path in _entries_of_run(directory):
            path.rename(aside / path.name)
    stays = {p.name for p in directory.iterdir()} - {MARKER, _ASIDE, _KEPT}
    return [f"{directory / name} stays" for name in sorted(stays)] + moved


@contextlib.contextmanager
def replace_run(directory: Path) -> Iterator[None]:
    """Delete the run that was set aside when the block ends.

    If the block fails before the new run's first checkpoint, restore the old run instead.
    """
    try:
        yield
    except BaseException:
        if not _has_result(directory):
            _put_back(directory)
            raise
        delete_replaced(directory)
        raise
    delete_replaced(directory)


def delete_replaced(directory: Path) -> None:
    """Delete the run that was set aside, if there is one."""
    if (directory / _ASIDE).is_dir():
        shutil.rmtree(directory / _ASIDE)


def _put_back(directory: Path) -> None:
    aside = directory / _ASIDE
    marker = _read_marker(aside)
    if marker is None:
        return
    _delete_run(directory)
    write_json(directory / MARKER, marker)  # first, so that a kill leaves one run
    for path in _entries_of_run(aside):
        path.rename(directory / path.name)
    (aside / MARKER).unlink()
    aside.rmdir()


def move_foreign_files(directory: Path, under: str = "") -> list[str]:
    """Move other files in the run's directories to `kept`; return a line for each.

    After a finished run these are files added later; after an interrupted run, files that it does
    not write among its checkpoints. `under` limits the search to one directory.
    """
    marker = _read_marker(directory) or {}

    def belongs_to_run(name: str) -> bool:
        if "files" in marker:
            return name in marker["files"]
        if name.startswith(f"{ADAPTER}/"):
            return name in marker.get("adapter", [name])
        among = name.removeprefix(f"{CHECKPOINTS}/")
        if among == name or _IN_CHECKPOINTS.fullmatch(among):
            return True
        one, _, file = among.partition("/")
        return file in checkpoints.listed(directory / CHECKPOINTS / one)

    unknown = [
        name for name in _files(directory) if name.startswith(under) and not belongs_to_run(name)
    ]
    lines = []
    for name in sorted(unknown):
        if len(Path(name).parts) > 1:
            to = _free(directory / _KEPT / name)
            to.parent.mkdir(parents=True, exist_ok=True)
            (directory / name).rename(to)
            lines.append(f"{directory / name} is now {to}")
    return lines


def _files(directory: Path) -> set[str]:
    """Return the relative POSIX paths of all files and links below the run's own names."""
    roots = [directory / name for name in OWN]
    return {
        path.relative_to(directory).as_posix()
        for root in roots
        for path in (root, *(() if root.is_symlink() else root.rglob("*")))
        if path.is_file() or path.is_symlink()
    }


def _entries_of_run(directory: Path) -> list[Path]:
    """Return the run's own entries in `directory`, complete or partial, without the marker."""
    names = {*OWN, *(f".{name}.partial" for name in OWN)}
    return [path for path in directory.iterdir() if path.name in names]


def _delete_run(directory: Path) -> None:
    for path in _entries_of_run(directory):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _free(path: Path) -> Path:
    """Return `path`, with a number appended if it exists."""
    number, free = 1, path
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def _has_result(directory: Path) -> bool:
    """Whether the run in `directory` has an intact checkpoint or a summary."""
    intact, _ = checkpoints.find_newest_intact(directory / CHECKPOINTS)
    return intact is not None or (directory / SUMMARY).is_file()


def _read_marker(directory: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        marker = json.loads(read_plain(directory / MARKER))
        if isinstance(marker, dict) and isinstance(marker.get("run"), str):
            return marker
    return None
