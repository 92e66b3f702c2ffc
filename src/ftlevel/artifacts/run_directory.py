"""Create, lock, read and write a run directory, and track which of its files belong to the run.

A lock admits one run at a time and ends with the process. Recipes are described with their git
state. Only files of the run are replaced or deleted: a marker is written first; `--overwrite` moves
the old run's files aside, deletes them once the new run has a checkpoint or finishes, and restores
them if it fails earlier.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.files import check_regular, read_plain, write_json, write_text
from ftlevel.errors import ConfigError

MARKER = ".ftlevel.json"
CONFIG, SUMMARY, METRICS, README = "config.yaml", "summary.json", "metrics.jsonl", "README.md"
REPORT, ANSWERS, ROLLOUTS = "report.html", "validation.jsonl", "rollouts.jsonl"
ADAPTER, CHECKPOINTS = "adapter", "checkpoints"
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_FILES = (CONFIG, SUMMARY, METRICS, README, REPORT, ANSWERS, ROLLOUTS, "places.json")
OWN = (*_FILES, ADAPTER, CHECKPOINTS, "base", *_TRACKERS)
"""Names of everything that a run writes into the directory, except the marker."""

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
    """Record the files of a finished run; files found later do not belong to the run."""
    run = (_read_marker(directory) or {}).get("run", uuid.uuid4().hex)
    write_json(directory / MARKER, {"run": run, "files": sorted(_files(directory))})


def mark_resumed(directory: Path) -> None:
    """Record that a finished run resumes: of its files, only the adapter's stay in the record."""
    marker = _read_marker(directory)
    if marker and (files := marker.pop("files", None)) is not None:
        marker["adapter"] = [name for name in files if name.startswith(f"{ADAPTER}/")]
        write_json(directory / MARKER, marker)


def mark_end_once(directory: Path) -> None:
    """Record the files of a finished run if they are not recorded yet, as after a kill."""
    if "files" not in (_read_marker(directory) or {}):
        mark_end(directory)


def is_free(directory: Path) -> bool:
    """Whether `directory` is empty, apart from an incomplete marker."""
    return all(path.name == f".{MARKER}.partial" for path in directory.iterdir())


def is_run(directory: Path) -> bool:
    """Whether `directory` contains the marker of a run."""
    return _read_marker(directory) is not None


def check_replaceable(directory: Path) -> None:
    """Raise ConfigError unless `directory` has a marker.

    Links and home, root and git directories are refused too.
    """
    where, error = directory.resolve(), None
    if directory.is_symlink():
        error = f"it is a link to {directory.readlink()}"
    elif where == where.parent:
        error = "it is the root of the file system"
    elif where == Path.home().resolve():
        error = "it is your home directory"
    elif (where / ".git").exists():
        error = "it is the root of a git work tree"
    elif not is_run(directory):
        error = f"it is not a run of ftlevel (no {MARKER})"
    if error is not None:
        raise ConfigError(
            f"--overwrite {directory}: {error}, so it is not deleted. Choose another directory."
        )


def forget_adapter(directory: Path) -> None:
    """Delete the adapter that the run saved when it last ended; files added to it are kept."""
    move_foreign_files(directory, f"{ADAPTER}/")
    adapter = directory / ADAPTER
    if adapter.is_symlink():
        adapter.unlink()
    elif adapter.exists():
        shutil.rmtree(adapter)


def set_aside(directory: Path) -> list[str]:
    """Move the files of the run in `directory` aside; return messages on other files there.

    If a previous overwrite was killed, the old run is aside already. Then the new run is deleted if
    it has no results.
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
    """When the block ends, delete the run that was set aside.

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
    """Move files that the run did not write from its directories to `kept`; return messages.

    For a finished run, these are files added later; for an interrupted run, unknown files among its
    checkpoints. `under` limits the search to one directory.
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
    """Returns the relative POSIX paths of all files and links under the names in `OWN`."""
    roots = [directory / name for name in OWN]
    return {
        path.relative_to(directory).as_posix()
        for root in roots
        for path in (root, *(() if root.is_symlink() else root.rglob("*")))
        if path.is_file() or path.is_symlink()
    }


def _entries_of_run(directory: Path) -> list[Path]:
    """Returns the entries of `directory` named in `OWN`, also partial ones, without the marker."""
    names = {*OWN, *(f".{name}.partial" for name in OWN)}
    return [path for path in directory.iterdir() if path.name in names]


def _delete_run(directory: Path) -> None:
    for path in _entries_of_run(directory):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _free(path: Path) -> Path:
    """Returns `path`, with a number appended if it exists."""
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


try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def lock_directory(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock `directory` (flock) inside the block; raise ConfigError if another process holds it.

    With `shared`, other processes may share the lock. File systems without locks are not locked. No
    lock file is created.
    """
    descriptor = _open(directory)
    try:
        if descriptor is not None and fcntl is not None:
            try:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"--output-dir {directory}: another run is writing to it"
                    f"{_holder(descriptor)}. Wait until it ends, or choose another directory."
                ) from None
            except OSError:  # no locks on this file system
                pass
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def check_unclaimed(directory: Path) -> None:
    """Raise ConfigError if another run writes into `directory`; uses a shared lock."""
    with lock_directory(directory, shared=True):
        pass


def _holder(descriptor: int) -> str:
    """Returns the process that holds the lock, from /proc/locks; empty if unknown."""
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            values = line.split()
            if values[1] == "FLOCK" and values[5] == f"{device}:{status.st_ino}":
                return f" (process {values[4]})"
    return ""


def _open(directory: Path) -> int | None:
    try:
        return os.open(directory, os.O_RDONLY)
    except OSError:
        return None


ORIGIN = "origin.json"
"""File in checkpoints with everything that must be unchanged when a run resumes."""
_CHANGES, _NOTES = "changes.jsonl", "notes.jsonl"


def find_run(directory: Path) -> Path | None:
    """Find the run directory of an adapter or checkpoint; None if it is not in one."""
    if directory.name in ("", ".."):
        directory = directory.resolve()
    run = directory.parent
    if directory.absolute().parent.name == CHECKPOINTS:
        run = run.parent if run.name == CHECKPOINTS else directory.absolute().parent.parent
    return run if (run / CONFIG).is_file() else None


class RunDirectory:
    """Paths of the files of one run; `adapter` also contains the model of `--method full`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / ADAPTER
        self.checkpoints = path / CHECKPOINTS
        self.summary = path / SUMMARY
        self.report = path / REPORT

    def write_config(self, text: str) -> None:
        """Write config.yaml."""
        write_text(self.path / CONFIG, text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        write_json(self.summary, summary)

    def write_answers(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write validation.jsonl, one line per validation row; delete it if there are none."""
        if not lines:  # old answers may be of a different model
            (self.path / ANSWERS).unlink(missing_ok=True)
            return
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(self.path / ANSWERS, text)

    def read_summary(self) -> dict[str, Any] | None:
        """Read summary.json of a finished run with saved weights, or None."""
        try:
            summary = json.loads(read_plain(self.path / SUMMARY))
        except (OSError, ValueError, RecursionError):
            return None
        has_weights = isinstance(summary, dict) and any(self.adapter.glob("*.safetensors"))
        return summary if has_weights else None

    def write_card(self, text: str) -> None:
        """Write README.md."""
        write_text(self.path / README, text)

    def write_changes(self, step: int, changes: Sequence[Mapping[str, Any]]) -> None:
        """Append settings that changed when the run resumed at `step`."""
        with (self.checkpoints / _CHANGES).open("a", encoding="utf-8") as file:
            for change in changes:
                file.write(json.dumps({"step": step, **change}, default=str) + "\n")

    def read_changes(self) -> list[dict[str, Any]]:
        """Load the settings that changed when the run was resumed."""
        return read_objects(self.checkpoints / _CHANGES)

    def note(self, note: Mapping[str, Any]) -> None:
        """Append an event with its `step`, such as out-of-memory or a skipped step."""
        with (self.checkpoints / _NOTES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(note, default=str) + "\n")

    def rewind_notes(self, step: int) -> None:
        """Remove events after `step`, which will be repeated."""
        path = self.checkpoints / _NOTES
        if path.is_file():
            lines = [json.dumps(note) + "\n" for note in self.read_notes() if note["step"] <= step]
            write_text(path, "".join(lines))

    def read_notes(self) -> list[dict[str, Any]]:
        """Load the events of the run, without incomplete lines."""
        notes = read_objects(self.checkpoints / _NOTES)
        return [note for note in notes if isinstance(note.get("step"), int)]

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")

    def read_log(self, step: int) -> list[dict[str, Any]]:
        """Load the records of metrics.jsonl up to `step`."""
        return self._log_until(step)[1]

    def rewind_log(self, step: int) -> list[dict[str, Any]]:
        """Remove records after `step` from metrics.jsonl, and return the remaining ones.

        An incomplete last line is removed too; lines without a step stay.
        """
        lines, records = self._log_until(step)
        if (path := self.path / METRICS).is_file():
            write_text(path, "".join(lines))
        return records

    def _log_until(self, step: int) -> tuple[list[str], list[dict[str, Any]]]:
        path = self.path / METRICS
        lines: list[str] = []
        records: list[dict[str, Any]] = []
        if not path.is_file():
            return lines, records
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
                if not line.endswith("\n"):
                    continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                if record["step"] > step:
                    continue
                records.append(record)
            lines.append(line.rstrip("\n") + "\n")
        return lines, records


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Load the JSON objects of a file's lines; skip invalid lines."""
    objects = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                objects.append(value)
    return objects


def check_output(directory: Path | None, *, overwrite: bool, resume: bool) -> None:
    """Raise ConfigError if `directory` cannot be written, before anything is loaded.

    A directory that is not empty needs `overwrite`, or `resume` and a run in it.
    """
    target = directory or Path("runs") / "x"
    if directory is not None and directory.exists():
        if not directory.is_dir():
            raise ConfigError(f"--output-dir {directory} is a file. Name a directory.")
        parts = [*directory.iterdir(), *(directory / CHECKPOINTS).glob("*")]
        check_regular(parts, f"--output-dir {directory}")
        check_unclaimed(directory)
        if not is_free(directory):
            _check_kind(directory, overwrite, resume)
    elif directory is not None and directory.is_symlink():
        raise ConfigError(
            f"--output-dir {directory} is a link to {directory.readlink()}, which does not exist. "
            "Choose another directory."
        )
    existing = next(p for p in (target, *target.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--output-dir {target}: {existing} cannot be written. Choose another directory."
        )


def _check_kind(directory: Path, overwrite: bool, resume: bool) -> None:
    if overwrite:
        check_replaceable(directory)
    elif not resume:
        raise ConfigError(
            f"--output-dir {directory} exists and is not empty. Choose another directory, or pass "
            "--overwrite to replace it or --resume to resume it."
        )
    elif not is_run(directory) and not (directory / CONFIG).is_file():
        raise ConfigError(
            f"--output-dir {directory} is not a run: it contains no {CONFIG}. Drop --resume."
        )


def open_run(
    directory: Path | None, name: str, *, overwrite: bool, resume: bool = False
) -> tuple[RunDirectory, list[str]]:
    """Create the run directory; return it with messages on other files in it.

    Without `directory`, the first free runs/NAME-N is used. `overwrite` sets an existing run aside;
    `resume` restarts a run that was killed before the first result. Raises ConfigError if it cannot
    be created or a different run uses it.
    """
    moved: list[str] = []
    try:
        path = directory or _next_free(Path("runs"), name)
        path.mkdir(parents=True, exist_ok=True)
        with lock_directory(path):
            if overwrite and not is_free(path):
                check_replaceable(path)
                moved = set_aside(path)
            elif is_run(path) and not resume:
                raise FileExistsError
            mark(path)
            run = RunDirectory(path)
            run.checkpoints.mkdir(exist_ok=resume)
            for left in (
                path / METRICS,
                path / ROLLOUTS,
                run.checkpoints / _CHANGES,
                run.checkpoints / _NOTES,
            ):  # left by a killed run
                left.unlink(missing_ok=True)
    except FileExistsError:
        raise ConfigError(
            f"--output-dir {directory}: another run has started in it. Choose another directory."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--output-dir {directory or 'runs'} cannot be created ({error.strerror}). Choose "
            "another directory."
        ) from None
    return run, moved


def _next_free(parent: Path, name: str) -> Path:
    """Create and return the first parent/NAME-N that does not exist."""
    parent.mkdir(parents=True, exist_ok=True)
    clean = re.sub(r"[^\w.-]+", "-", name).strip("-")
    for number in itertools.count(1):
        path = parent / f"{clean}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable: the count has no end")


def describe_recipe(path: Path) -> dict[str, Any]:
    """Returns a recipe's path, SHA-256, git commit, and whether it differs from the commit.

    `commit` and `changed` are None if it is not committed. The repository may be untrusted, so `git
    status` must not be used: it runs programs named in the settings (core.fsmonitor, filters).
    """
    path = path.resolve()
    committed_hash = _git(path, "rev-parse", "--verify", "--end-of-options", f"HEAD:./{path.name}")
    commit = _git(path, "rev-parse", "HEAD") if committed_hash else None
    current_hash = _git(path, "hash-object", "--no-filters", "--", path.name) if commit else None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    changed = None if commit is None else current_hash != committed_hash
    return {"path": str(path), "sha256": digest, "commit": commit, "changed": changed}


def _git(path: Path, *arguments: str) -> str | None:
    """Returns git's output in the directory of `path`; None if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(path.parent), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
