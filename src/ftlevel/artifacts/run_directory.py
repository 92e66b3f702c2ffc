"""The run directory: where it is, that it may be written, and what lies where in it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftlevel.artifacts.claim import check_unclaimed
from ftlevel.artifacts.files import write_json, write_text
from ftlevel.errors import ConfigError

ORIGIN = "origin.json"
"""In checkpoints: everything that must be the same when a run goes on."""
CONFIG, SUMMARY, METRICS, CARD = "config.yaml", "summary.json", "metrics.jsonl", "README.md"


class RunDirectory:
    """The files of one run.

    Attributes:
        path: the directory.
        adapter: where the adapter, or the model of `--method full`, is saved.
        checkpoints: where checkpoint-N directories are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"

    def write_config(self, text: str) -> None:
        """Write config.yaml."""
        write_text(self.path / CONFIG, text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        write_json(self.path / SUMMARY, summary)

    def write_card(self, text: str) -> None:
        """Write README.md."""
        write_text(self.path / CARD, text)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")

    def rewind_log(self, step: int) -> list[dict[str, Any]]:
        """Take what was logged past `step` out of metrics.jsonl, and return the records before it.

        A last line that was cut short goes too; lines that are not ours stay.
        """
        path = self.path / METRICS
        if not path.is_file():
            return []
        lines, records = [], []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
                if not line.endswith("\n"):
                    continue
            if isinstance(record, dict) and "step" in record:
                if record["step"] > step:
                    continue
                records.append(record)
            lines.append(line.rstrip("\n") + "\n")
        write_text(path, "".join(lines))
        return records


def check_output(directory: Path | None, *, overwrite: bool, resume: bool) -> None:
    """Refuse an output directory that cannot be written, before anything is loaded.

    Raises:
        ConfigError: it exists and neither `overwrite` nor `resume` is set, is a file, holds
            something other than a run, or its parent cannot be written.
    """
    target = directory or Path("runs") / "x"
    if directory is not None and directory.exists():
        if not directory.is_dir():
            raise ConfigError(f"--output-dir {directory} is a file. Name a directory.")
        check_unclaimed(directory)
        if resume:
            if not (directory / CONFIG).is_file():
                raise ConfigError(
                    f"--output-dir {directory} is not a run: it has no {CONFIG}. There is nothing "
                    "to resume; drop --resume."
                )
        elif any(directory.iterdir()):
            _check_replaceable(directory, overwrite)
    elif directory is not None and directory.is_symlink():
        raise ConfigError(
            f"--output-dir {directory} is a link to {directory.readlink()}, which does not exist. "
            "Name another directory."
        )
    elif resume:
        raise ConfigError(f"--output-dir {directory} does not exist, so it cannot be resumed.")
    existing = next(p for p in (target, *target.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--output-dir {target}: {existing} cannot be written. Name another directory."
        )


def _check_replaceable(directory: Path, overwrite: bool) -> None:
    if not overwrite:
        raise ConfigError(
            f"--output-dir {directory} exists and is not empty. Name another directory, or pass "
            "--overwrite to replace it or --resume to go on with it."
        )
    if not (directory / CONFIG).is_file():
        raise ConfigError(
            f"--overwrite {directory}: it is not a run of ftlevel (no {CONFIG}), so it is not "
            "deleted. Name another directory."
        )


def open_run(directory: Path | None, name: str, *, overwrite: bool) -> RunDirectory:
    """Create the run directory.

    Args:
        directory: the user's wish, or None for the first free runs/NAME-N.
        name: what the run is called if the user did not say.
        overwrite: delete a run that exists.

    Raises:
        ConfigError: it cannot be created, or another run has begun in it.
    """
    try:
        if directory is None:
            run = RunDirectory(_next_free(Path("runs"), name))
        else:
            if directory.exists() and overwrite:
                check_unclaimed(directory)
                shutil.rmtree(directory)
            directory.mkdir(parents=True, exist_ok=True)  # check_output has seen that it is empty
            run = RunDirectory(directory)
        run.checkpoints.mkdir()
    except FileExistsError:
        raise ConfigError(
            f"--output-dir {directory}: another run has begun in it since this one started. Name "
            "another directory."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--output-dir {directory or 'runs'} cannot be created ({error.strerror}). Name "
            "another directory."
        ) from None
    return run


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
