"""What a run wrote about itself, read for a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlevel.artifacts.ownership import METRICS, SUMMARY
from ftlevel.errors import InputError

MOST_CLASSES = 30  # of a confusion matrix
SHOWN = 10  # rows, of the best and of the worst


@dataclass(frozen=True)
class Answers:
    """Rows that a run answered.

    Attributes:
        classes: names of the classes, the most frequent first; empty where answers are no classes.
        counts: true class → predicted class → rows.
        per_class: class → precision, recall, F1 and rows.
        worst: rows with the highest loss; the first that are wrong where none is known.
        best: rows with the lowest; none where no loss is known.
        total: how many rows there were.
    """

    classes: list[str] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    per_class: list[tuple[str, float, float, float, int]] = field(default_factory=list)
    worst: list[dict[str, Any]] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0


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
        predictions: what `ftlevel evaluate --predictions` wrote of it.

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
    answers = None if predictions is None else sum_up(_lines(predictions))
    return RunFacts(path.resolve().name, path, summary, records, answers)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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


def sum_up(rows: Iterator[dict[str, Any]]) -> Answers:
    """Return the answers of `rows`, each with `predicted` and `true`, and maybe a `loss`."""
    counts: dict[str, Counter[str]] = {}
    kept, are_classes, total = list[dict[str, Any]](), True, 0
    for row in rows:
        total += 1
        kept.append(row)
        true, predicted = row.get("true"), row.get("predicted")
        are_classes &= isinstance(true, str) and isinstance(predicted, str)
        if are_classes:
            counts.setdefault(str(true), Counter())[str(predicted)] += 1
        if len(kept) > _HELD:
            kept = _ends(kept)
    names = Counter({name: sum(own.values()) for name, own in counts.items()})
    for own in counts.values():
        for name in own:
            names.setdefault(name, 0)
    if not are_classes or not 1 < len(names) <= MOST_CLASSES:
        names, counts = Counter(), {}
    classes = [name for name, _ in names.most_common()]
    has_loss = all(isinstance(row.get("loss"), int | float) for row in kept)
    ordered = sorted(kept, key=lambda row: row["loss"]) if has_loss else kept
    wrong = [row for row in ordered if row.get("predicted") != row.get("true")]
    return Answers(
        classes, counts, [_scores(name, counts, names[name]) for name in classes],
        ordered[: -SHOWN - 1 : -1] if has_loss else wrong[:SHOWN],
        ordered[:SHOWN] if has_loss else [], total,
    )  # fmt: skip


_HELD = 20_000  # rows, of which the ends are kept


def _ends(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not all(isinstance(row.get("loss"), int | float) for row in rows):
        return [row for row in rows if row.get("predicted") != row.get("true")][:SHOWN]
    rows.sort(key=lambda row: row["loss"])
    return rows[:SHOWN] + rows[-SHOWN:]


def _scores(
    name: str, counts: Mapping[str, Counter[str]], rows: int
) -> tuple[str, float, float, float, int]:
    """Return precision, recall and F1 of a class, and how many rows have it."""
    hit = counts.get(name, Counter())[name]
    said = sum(own[name] for own in counts.values())
    precision, recall = hit / said if said else 0.0, hit / rows if rows else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
    return name, precision, recall, f1, rows
