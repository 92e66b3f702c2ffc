"""What a run wrote about itself, read for a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import read_plain
from ftlevel.artifacts.ownership import ANSWERS, METRICS, SUMMARY
from ftlevel.artifacts.report.answers import Answers, sum_up
from ftlevel.errors import InputError


@dataclass(frozen=True)
class RunFacts:
    """A run for the page.

    Attributes:
        name: of its directory; told apart from others of the name by the path before it.
        path: where it is.
        summary: summary.json.
        records: metrics.jsonl.
        answers: of rows that were scored; None where none were given.
    """

    name: str
    path: Path
    summary: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    answers: Answers | None = None


def read_run_facts(path: Path, predictions: Path | None = None) -> RunFacts:
    """Return what the run in `path` wrote.

    Args:
        path: of a run that is done.
        predictions: what `ftlevel evaluate --predictions` wrote of it; None for what the run
            itself wrote of its validation rows.

    Raises:
        InputError: it is no run, or not done, or a file cannot be read.
    """
    if not (path / SUMMARY).is_file():
        here = "there is no such directory" if not path.is_dir() else f"it has no {SUMMARY}"
        raise InputError(
            f"{path} is not a run that is done: {here}. Expected the directory that ftlevel train "
            "wrote, as runs/NAME."
        )
    summary = _read(path / SUMMARY)
    records = list(_lines(path / METRICS)) if (path / METRICS).is_file() else []
    if predictions is None and (path / ANSWERS).is_file():
        predictions = path / ANSWERS
    answers = None if predictions is None else sum_up(_lines(predictions))
    return RunFacts(path.resolve().name, path, summary, records, answers)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}).") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no object.")
    return value


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    value = json.loads(line)
                except ValueError:
                    if line.endswith("\n"):  # else a kill cut the last one
                        raise InputError(f"{path}:{number}: not valid JSON.") from None
                    return
                if isinstance(value, dict):
                    yield value
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}).") from None
