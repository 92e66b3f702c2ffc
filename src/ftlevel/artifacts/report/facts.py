"""Rows that a run answered, counted: confusion, scores of each class or tag, the best and worst.

What a run wrote about itself, read for a page.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ftlevel.artifacts.files import read_plain
from ftlevel.artifacts.ownership import ANSWERS, METRICS, SUMMARY
from ftlevel.errors import InputError

MOST_CLASSES = 30  # of a confusion matrix
SHOWN = 10  # rows, of the best and of the worst
_BANDS = 10  # of lengths


@dataclass(frozen=True)
class Answers:
    """Rows that a run answered.

    Attributes:
        classes: names of the classes or tags, the most frequent first; empty of other answers.
        counts: true class → predicted class → how many.
        per_class: class → precision, recall, F1 and how many.
        unit: what is counted: rows, or words that are tagged.
        lengths: of texts: least and most words of the right answer, rows, their mean loss.
        worst: rows with the highest loss; the first that are wrong where none is known.
        best: rows with the lowest; none where no loss is known.
        total: how many rows there were.
    """

    classes: list[str] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    per_class: list[tuple[str, float, float, float, int]] = field(default_factory=list)
    unit: str = "rows"
    lengths: list[tuple[int, int, int, float]] = field(default_factory=list)
    worst: list[dict[str, Any]] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0


def sum_up(rows: Iterator[dict[str, Any]]) -> Answers:
    """Return the answers of `rows`, each with `predicted` and `true`, and maybe a `loss`."""
    counts: dict[str, Counter[str]] = {}
    kept, by_length, units, total = list[dict[str, Any]](), list[tuple[int, float]](), set(), 0
    for row in rows:
        total += 1
        kept.append(row)
        unit, pairs = _pairs(row.get("true"), row.get("predicted"))
        units.add(unit)
        for true, predicted in pairs:
            counts.setdefault(true, Counter())[predicted] += 1
        answer = _answer(row)
        if answer is not None and isinstance(row.get("loss"), int | float):
            by_length.append((len(answer.split()), row["loss"]))
        if len(kept) > _HELD:
            kept = _ends(kept)
    names = Counter({name: sum(own.values()) for name, own in counts.items()})
    for own in counts.values():
        for name in own:
            names.setdefault(name, 0)
    if len(units) != 1 or "" in units or not 1 < len(names) <= MOST_CLASSES:
        names, counts = Counter(), {}
    classes = [name for name, _ in names.most_common()]
    has_loss = all(isinstance(row.get("loss"), int | float) for row in kept)
    ordered = sorted(kept, key=lambda row: row["loss"]) if has_loss else kept
    wrong = [row for row in ordered if "true" in row and row.get("predicted") != row["true"]]
    return Answers(
        classes, counts, [_scores(name, counts, names[name]) for name in classes],
        next(iter(units)) if classes else "rows", [] if classes else _lengths(by_length),
        ordered[: -SHOWN - 1 : -1] if has_loss else wrong[:SHOWN],
        ordered[:SHOWN] if has_loss else [], total,
    )  # fmt: skip


def _answer(row: Mapping[str, Any]) -> str | None:
    """Return the text that is right: of several answers to a question the first."""
    right = row.get("true", row.get("chosen"))
    if isinstance(right, list) and right and isinstance(row.get("predicted"), str):
        right = right[0]
    return right if isinstance(right, str) else None


def _pairs(true: Any, predicted: Any) -> tuple[str, list[tuple[str, str]]]:
    """Return what is counted of a row, or nothing, and its pairs of what is true and predicted."""
    if isinstance(true, str) and isinstance(predicted, str):
        return "rows", [(true, predicted)]
    if isinstance(true, list) and isinstance(predicted, list) and len(true) == len(predicted):
        pairs = list(zip(true, predicted, strict=True))
        if all(isinstance(tag, str) for pair in pairs for tag in pair):
            return "words", pairs
    return "", []


def _lengths(found: list[tuple[int, float]]) -> list[tuple[int, int, int, float]]:
    """Return the mean loss of the shortest tenth of true answers, of the next, and so on."""
    found.sort()
    if len({length for length, _ in found}) < _BANDS:
        return []
    bands = [found[len(found) * at // _BANDS : len(found) * (at + 1) // _BANDS]
             for at in range(_BANDS)]  # fmt: skip
    return [(band[0][0], band[-1][0], len(band), fmean(loss for _, loss in band)) for band in bands]


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
