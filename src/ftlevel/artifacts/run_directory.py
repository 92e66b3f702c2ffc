"""Create, lock, read and write a run directory, and record which of its files belong to the run.

A lock admits one run at a time and ends with the process. Only files of the run are replaced or
deleted: `--overwrite` moves the old run's files to a backup, deletes it once the new run has a
checkpoint or finishes, and restores it if the new run fails earlier.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.files import (
    check_regular,
    check_writable,
    lock_dir,
    read_json,
    write_json,
    write_text,
)
from ftlevel.errors import ConfigError, InputError
from ftlevel.safe_io import open_existing

MARKER = ".ftlevel.json"
CONFIG, SUMMARY, METRICS, README = "config.yaml", "summary.json", "metrics.jsonl", "README.md"
REPORT, ANSWERS, ROLLOUTS = "report.html", "validation.jsonl", "rollouts.jsonl"
ADAPTER, CHECKPOINTS = "adapter", "checkpoints"
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_FILES = (CONFIG, SUMMARY, METRICS, README, REPORT, ANSWERS, ROLLOUTS, "places.json")
OWN = (*_FILES, ADAPTER, CHECKPOINTS, "base", *_TRACKERS)
"""Names of everything that a run writes into the directory, except the marker."""

_BACKUP, _KEPT = ".replaced", "kept"
_LINKLESS = (*OWN, MARKER, _BACKUP, _KEPT)

_IN_CHECKPOINTS = re.compile(
    r"identity\.json|notes\.jsonl|\.seen-.*|\.[^/]*\.partial(/.*)?|"
    r"((checkpoint|rejected|best)-\d+(-\d+)?/(README\.md|.*config\.json|.*\.safetensors|"
    r".*\.index\.json|(optimizer|scheduler|scaler)\.pt|rng_state\w*\.pth|trainer_state\.json|"
    r"training_args\.bin|(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|spiece)"
    r".*|(losses|progress)\.json|adalora_ranks\.json|stream\.(json|arrow)|manifest\.json|\..*\.partial))"
)
"""Files that an interrupted run may have left in its checkpoints directory."""


def create_marker(run_dir: Path) -> None:
    """Write the marker, the file by which `run_dir` is recognized as a run."""
    write_json(run_dir / MARKER, {"run": uuid.uuid4().hex})


def record_files(run_dir: Path) -> None:
    """Record the files of a finished run in its marker; later files do not belong to the run."""
    run = (_load_marker(run_dir) or {}).get("run", uuid.uuid4().hex)
    write_json(run_dir / MARKER, {"run": run, "files": sorted(_files(run_dir))})


def mark_resumed(run_dir: Path) -> None:
    """Reduce the list of files in the marker of a run that resumes to those of its adapter."""
    marker = _load_marker(run_dir)
    if marker and (files := marker.pop("files", None)) is not None:
        marker["adapter"] = [name for name in files if name.startswith(f"{ADAPTER}/")]
        write_json(run_dir / MARKER, marker)


def record_files_once(run_dir: Path) -> None:
    """Call `record_files` if the marker has no list of files, as after a killed process."""
    if "files" not in (_load_marker(run_dir) or {}):
        record_files(run_dir)


def is_empty(run_dir: Path) -> bool:
    """Whether `run_dir` is empty, apart from a marker that was only partly written."""
    return all(path.name == f".{MARKER}.partial" for path in run_dir.iterdir())


def is_run(run_dir: Path) -> bool:
    """Whether `run_dir` contains the marker of a run."""
    return _load_marker(run_dir) is not None


def check_replaceable(run_dir: Path) -> None:
    """Raise ConfigError unless `run_dir` is a run and not a link, home, root or git directory."""
    where, problem = run_dir.resolve(), None
    if run_dir.is_symlink():
        problem = f"it is a link to {run_dir.readlink()}"
    elif where == where.parent:
        problem = "it is the root of the file system"
    elif where == Path.home().resolve():
        problem = "it is your home directory"
    elif (where / ".git").exists():
        problem = "it is the root of a git work tree"
    elif not is_run(run_dir):
        problem = f"it is not a run of ftlevel (no {MARKER})"
    if problem is not None:
        raise ConfigError(
            f"--overwrite {run_dir}: {problem}, so it is not deleted. Choose another directory."
        )


def delete_adapter(run_dir: Path) -> None:
    """Delete the run's adapter; files in it that the run did not write are moved to `kept`."""
    move_foreign_files(run_dir, f"{ADAPTER}/")
    adapter = run_dir / ADAPTER
    if adapter.is_symlink():
        adapter.unlink()
    elif adapter.exists():
        shutil.rmtree(adapter)


def create_backup(run_dir: Path) -> list[str]:
    """Move a run's files to a backup directory; return messages on files left or moved aside.

    If a killed `--overwrite` left a backup of another run, the new run in `run_dir` is deleted if
    it has no results; otherwise it replaces that backup.
    """
    backup_dir = run_dir / _BACKUP
    old_marker, marker = _load_marker(backup_dir), _load_marker(run_dir)
    moved_files = move_foreign_files(run_dir)
    is_partial = old_marker is not None and old_marker["run"] != (marker or {}).get("run")
    if backup_dir.is_dir() and (old_marker is None or (is_partial and _has_result(run_dir))):
        shutil.rmtree(backup_dir)
        is_partial = False
    if is_partial:  # a new run that was killed
        _delete_run(run_dir)
    else:
        backup_dir.mkdir(exist_ok=True)
        write_json(backup_dir / MARKER, marker)
        for path in _list_run_files(run_dir):
            path.rename(backup_dir / path.name)
    remaining = {p.name for p in run_dir.iterdir()} - {MARKER, _BACKUP, _KEPT}
    return [f"{run_dir / name} stays" for name in sorted(remaining)] + moved_files


@contextlib.contextmanager
def replace_run(run_dir: Path) -> Iterator[None]:
    """Delete the backup after the block; restore it if the block fails before a first result."""
    try:
        yield
    except BaseException:
        if not _has_result(run_dir):
            _restore_backup(run_dir)
            raise
        delete_backup(run_dir)
        raise
    delete_backup(run_dir)


def delete_backup(run_dir: Path) -> None:
    """Delete the backup of the old run, if there is one."""
    if (run_dir / _BACKUP).is_dir():
        shutil.rmtree(run_dir / _BACKUP)


def _restore_backup(run_dir: Path) -> None:
    backup_dir = run_dir / _BACKUP
    marker = _load_marker(backup_dir)
    if marker is None:
        return
    _delete_run(run_dir)
    write_json(run_dir / MARKER, marker)  # first, so that a kill leaves one run
    for path in _list_run_files(backup_dir):
        path.rename(run_dir / path.name)
    (backup_dir / MARKER).unlink()
    backup_dir.rmdir()


def move_foreign_files(run_dir: Path, under: str = "") -> list[str]:
    """Move files that the run did not write from its directories to `kept`; return messages.

    For a finished run, these are files added later; for an interrupted run, unknown files among its
    checkpoints. `under` limits the search to one directory.
    """
    marker = _load_marker(run_dir) or {}

    def belongs_to_run(name: str) -> bool:
        if "files" in marker:
            return name in marker["files"]
        if name.startswith(f"{ADAPTER}/"):
            return name in marker.get("adapter", [name])
        relative = name.removeprefix(f"{CHECKPOINTS}/")
        if relative == name or _IN_CHECKPOINTS.fullmatch(relative):
            return True
        one, _, file = relative.partition("/")
        return file in checkpoints.listed(run_dir / CHECKPOINTS / one)

    unknown = [
        name for name in _files(run_dir) if name.startswith(under) and not belongs_to_run(name)
    ]
    lines = []
    for name in sorted(unknown):
        if len(Path(name).parts) > 1:
            to = _get_unused_path(run_dir / _KEPT / name)
            to.parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name).rename(to)
            lines.append(f"{run_dir / name} is now {to}")
    return lines


def _files(run_dir: Path) -> set[str]:
    return {
        path.relative_to(run_dir).as_posix()
        for root in [run_dir / name for name in OWN]
        for path in (root, *(() if root.is_symlink() else root.rglob("*")))
        if path.is_file() or path.is_symlink()
    }


def _list_run_files(run_dir: Path) -> list[Path]:
    names = {*OWN, *(f".{name}.partial" for name in OWN)}
    return [path for path in run_dir.iterdir() if path.name in names]


def _delete_run(run_dir: Path) -> None:
    for path in _list_run_files(run_dir):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _get_unused_path(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists() or candidate.is_symlink():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _has_result(run_dir: Path) -> bool:
    intact, _ = checkpoints.get_last_valid_checkpoint(run_dir / CHECKPOINTS)
    return intact is not None or (run_dir / SUMMARY).is_file()


def _load_marker(run_dir: Path) -> dict[str, Any] | None:
    with contextlib.suppress(InputError):
        marker = read_json(run_dir / MARKER)
        if isinstance(marker.get("run"), str):
            return marker
    return None


def check_lock(path: Path) -> None:
    """Raise ConfigError if another run writes to the directory."""
    with lock_dir(path, shared=True):
        pass


IDENTITY = "identity.json"
"""File in checkpoints with everything that must be unchanged when a run resumes."""
_NOTES = "notes.jsonl"


def get_run_dir(path: Path) -> Path | None:
    """Returns the run directory that contains the adapter or checkpoint `path`, or None."""
    if path.name in ("", ".."):
        path = path.resolve()
    run = path.parent
    if path.absolute().parent.name == CHECKPOINTS:
        run = run.parent if run.name == CHECKPOINTS else path.absolute().parent.parent
    return run if (run / CONFIG).is_file() else None


class RunDirectory:
    """Paths of the files of one run; `adapter` also contains the model of `--method full`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / ADAPTER
        self.checkpoints = path / CHECKPOINTS
        self.summary = path / SUMMARY
        self.report = path / REPORT

    def save_config(self, text: str) -> None:
        """Save config.yaml."""
        write_text(self.path / CONFIG, text)

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        """Save summary.json."""
        write_json(self.summary, summary)

    def save_predictions(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Save validation.jsonl, one line per validation row; delete it if there are none."""
        if not lines:  # old answers may be of a different model
            (self.path / ANSWERS).unlink(missing_ok=True)
            return
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(self.path / ANSWERS, text)

    def load_summary(self) -> dict[str, Any] | None:
        """Load summary.json of a finished run with saved weights; None for other runs."""
        try:
            summary = read_json(self.summary)
        except InputError:
            return None
        return summary if any(self.adapter.glob("*.safetensors")) else None

    def save_readme(self, text: str) -> None:
        """Save README.md."""
        write_text(self.path / README, text)

    def note(self, note: Mapping[str, Any]) -> None:
        """Append an event to notes.jsonl, such as a skipped step or a setting changed on resume.

        It must have `step`.
        """
        with open_existing(self.checkpoints / _NOTES) as file:
            file.write(json.dumps(note, default=str) + "\n")

    def truncate_events(self, step: int) -> None:
        """Remove events after `step` from notes.jsonl, because these steps are repeated.

        Changed settings (`field`) stay changed, so their events are kept.
        """
        path = self.checkpoints / _NOTES
        if path.is_file():
            notes = [n for n in self.load_events() if n["step"] <= step or "field" in n]
            write_text(path, "".join(json.dumps(note) + "\n" for note in notes))

    def load_events(self) -> list[dict[str, Any]]:
        """Load the events of the run, without incomplete lines."""
        notes = load_jsonl(self.checkpoints / _NOTES)
        return [note for note in notes if isinstance(note.get("step"), int)]

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open_existing(self.path / METRICS) as file:
            file.write(json.dumps(record, default=str) + "\n")

    def load_log(self, step: int) -> list[dict[str, Any]]:
        """Load the records of metrics.jsonl up to `step`."""
        return self._log_until(step)[1]

    def truncate_log(self, step: int) -> list[dict[str, Any]]:
        """Remove records after `step` from metrics.jsonl, and return the remaining ones."""
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


def load_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON objects in the lines of a file; invalid lines are skipped."""
    objects = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                objects.append(value)
    return objects


def check_output(output_dir: Path | None, *, overwrite: bool, resume: bool) -> None:
    """Raise ConfigError if `output_dir` cannot be written, or is not empty.

    With `overwrite` or `resume`, it may contain a run.
    """
    target = output_dir or Path("runs") / "x"
    if output_dir is not None and output_dir.exists():
        if not output_dir.is_dir():
            raise ConfigError(f"--output-dir {output_dir} is a file. Name a directory.")
        paths = [*output_dir.iterdir(), *(output_dir / CHECKPOINTS).glob("*")]
        check_regular(paths, f"--output-dir {output_dir}")
        if resume or overwrite:
            check_links(output_dir, _LINKLESS if resume else (_BACKUP, _KEPT))
        check_lock(output_dir)
        if not is_empty(output_dir):
            _check_existing(output_dir, overwrite, resume)
    elif output_dir is not None and output_dir.is_symlink():
        raise ConfigError(
            f"--output-dir {output_dir} is a link to {output_dir.readlink()}, which does not "
            "exist. Choose another directory."
        )
    check_writable(f"--output-dir {target}", target)


def check_links(output_dir: Path, names: Iterable[str]) -> None:
    """Raise InputError if a file in `names` of a run, or in one of these directories, is a link.

    Files behind it would be changed. Trackers use links, so their directories are not searched.
    """
    for path in (output_dir / name for name in names):
        is_searched = path.name not in _TRACKERS and not path.is_symlink()
        for link in (path, *(path.rglob("*") if is_searched else ())):
            if link.is_symlink():
                raise InputError(
                    f"--output-dir {output_dir}: {link.relative_to(output_dir)} is a link to "
                    f"{link.readlink()}, and files of a run are not written through links. Replace "
                    "it with a copy, or choose another directory."
                )


def _check_existing(output_dir: Path, overwrite: bool, resume: bool) -> None:
    if overwrite:
        check_replaceable(output_dir)
    elif not resume:
        raise ConfigError(
            f"--output-dir {output_dir} exists and is not empty. Choose another directory, or pass "
            "--overwrite to replace it or --resume to resume it."
        )
    elif not is_run(output_dir) and not (output_dir / CONFIG).is_file():
        raise ConfigError(
            f"--output-dir {output_dir} is not a run: it contains no {CONFIG}. Drop --resume."
        )


def open_run(
    output_dir: Path | None, name: str, *, overwrite: bool, resume: bool = False
) -> tuple[RunDirectory, list[str]]:
    """Create the run directory; return it with messages on other files in it.

    Without `output_dir`, it is runs/NAME-N with the first free N. `overwrite` moves an existing run
    to a backup; `resume` restarts a run that was killed before its first result. Raises ConfigError
    if it cannot be created or another run uses it.
    """
    moved_files: list[str] = []
    try:
        path = output_dir or _create_numbered_dir(Path("runs"), name)
        path.mkdir(parents=True, exist_ok=True)
        with lock_dir(path):
            if overwrite and not is_empty(path):
                check_replaceable(path)
                moved_files = create_backup(path)
            elif is_run(path) and not resume:
                raise FileExistsError
            create_marker(path)
            run = RunDirectory(path)
            run.checkpoints.mkdir(exist_ok=resume)
            for left in (
                path / METRICS,
                path / ROLLOUTS,
                run.checkpoints / _NOTES,
            ):  # left by a killed run
                left.unlink(missing_ok=True)
    except FileExistsError:
        raise ConfigError(
            f"--output-dir {output_dir}: another run has started in it. Choose another directory."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--output-dir {output_dir or 'runs'} cannot be created ({error.strerror}). Choose "
            "another directory."
        ) from None
    return run, moved_files


def _create_numbered_dir(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    clean = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    for number in itertools.count(1):
        path = parent / f"{clean}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable: the count has no end")


def get_recipe_info(path: Path) -> dict[str, Any]:
    """Returns path and SHA-256 of a recipe.

    Its git commit is not asked for: the repository may be a stranger's, and git runs programs that
    a repository's settings name.
    """
    path = path.resolve()
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
