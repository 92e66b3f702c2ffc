"""Read the files of a run; compute statistics of its predictions and retrieval scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.artifacts.files import read_json
from ftlevel.artifacts.row_sinks import bin_lengths
from ftlevel.artifacts.run_directory import ANSWERS, CONFIG, METRICS, SUMMARY
from ftlevel.errors import InputError
from ftlevel.extensions import hooks

MULTI_LABEL = "multi_label_classification"
NUM_BARS = 12
NUM_QUERIES = 10
SERIES = {
    "base_positive": "positives before",
    "positive": "positives",
    "base_negative": "best negatives before",
    "negative": "best negatives",
}
"""Prefix of a score's field → its heading."""


@dataclass(frozen=True)
class RetrievalStats:
    """Scores of validation queries.

    Attributes:
        series: kinds of scores that are counted, such as positives.
        bands: histogram bars: lower bound, upper bound, and a count per series.
        worst: queries with the lowest nDCG@10; ties are sorted by the closest negative.
        total: number of queries.
    """

    series: list[str]
    bands: list[tuple[float, float, list[int]]]
    worst: list[dict[str, Any]]
    total: int

    @property
    def largest(self) -> int:
        """Highest count of a histogram bar."""
        return max(count for _, _, counts in self.bands for count in counts)


def compute_retrieval_stats(rows: Iterable[dict[str, Any]]) -> RetrievalStats | None:
    """Returns statistics of `rows` with scores of positives and negatives; None without scores."""
    scored = [row | scores for row in rows if (scores := _query_scores(row))]
    if not scored:
        return None
    values = {
        title: [row[f"{name}_score"] for row in scored]
        for name, title in SERIES.items()
        if all(f"{name}_score" in row for row in scored)
    }
    worst = sorted(
        scored,
        key=lambda row: (row.get("ndcg@10", 0.0), row["positive_score"] - row["negative_score"]),
    )
    return RetrievalStats(
        list(values), _histogram(list(values.values())), worst[:NUM_QUERIES], len(scored)
    )


def _query_scores(row: Mapping[str, Any]) -> dict[str, float]:
    result: dict[str, float] = {}
    for base in ("", "base_"):
        names = [f"{base}positive_score", f"{base}negative_score"]
        scores, labels = row.get(f"{base}scores"), row.get("labels")
        if all(name in row for name in names):
            result |= {name: row[name] for name in names}
        elif isinstance(scores, list) and isinstance(labels, list):  # of a reranker
            good = [s for s, label in zip(scores, labels, strict=True) if label > 0]
            bad = [s for s, label in zip(scores, labels, strict=True) if label <= 0]
            if good and bad:
                result |= dict(zip(names, (max(good), max(bad)), strict=True))
    return result if "positive_score" in result else {}


def _histogram(series: Sequence[Sequence[float]]) -> list[tuple[float, float, list[int]]]:
    low, high = min(map(min, series)), max(map(max, series))
    width = (high - low) / NUM_BARS or 1.0
    counts = [[0] * len(series) for _ in range(NUM_BARS)]
    for number, scores in enumerate(series):
        for score in scores:
            counts[min(NUM_BARS - 1, int((score - low) / width))][number] += 1
    return [(low + at * width, low + (at + 1) * width, row) for at, row in enumerate(counts)]


def list_dimensions(summary: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """Returns (dimensions, nDCG@10, nDCG@10 before training) of each Matryoshka size."""
    before = summary.get("metrics_before", {})
    return [
        (name.rpartition("_")[2], value, before.get(name))
        for name, value in summary.get("metrics", {}).items()
        if name.startswith("ndcg@10_dim_")
    ]


MAX_CLASSES = 30  # in a confusion matrix
NUM_ROWS = 10  # best rows, and as many worst rows
_NUM_QUANTILES = 10  # length quantiles


@dataclass(frozen=True)
class PredictionStats:
    """Statistics of a run's predictions.

    Attributes:
        counts: true class → predicted class → count; empty if predictions are not classes.
        per_class: class, precision, recall, F1 and count.
        unit: unit of the counts: rows, or tagged words.
        lengths: for texts, per decile of length: minimum and maximum words, rows, mean loss.
        worst: rows with the highest loss, or wrong rows if there is no loss.
        best: rows with the lowest loss; none of `worst` if there are two rows or more.
    """

    classes: list[str]
    counts: dict[str, Counter[str]]
    per_class: list[tuple[str, float, float, float, int]]
    unit: str
    lengths: list[tuple[int, int, int, float]]
    worst: list[dict[str, Any]]
    best: list[dict[str, Any]]
    total: int

    @property
    def is_shown(self) -> bool:
        """Whether there are classes, lengths or rows to show."""
        return bool(self.classes or self.lengths or self.worst)


def compute_prediction_stats(
    rows: Iterable[dict[str, Any]], problem_type: str | None = None
) -> PredictionStats:
    """Returns statistics of `rows` with `predicted`, `true` and optionally `loss`."""
    counts: dict[str, Counter[str]] = {}
    candidates: list[dict[str, Any]] = []
    by_length: list[tuple[int, float]] = []
    units, total = set(), 0
    for row in rows:
        total += 1
        candidates.append(row)
        # Generated texts (with a number of tokens) are not classes, however few they are, and sets
        # of labels are no tags of words.
        has_classes = "tokens" not in row and problem_type != MULTI_LABEL
        unit, pairs = _pairs(row.get("true"), row.get("predicted")) if has_classes else ("", [])
        units.add(unit)
        for true, predicted in pairs:
            counts.setdefault(true, Counter())[predicted] += 1
        true_text = _true_text(row)
        if true_text is not None and isinstance(row.get("loss"), int | float):
            by_length.append((len(true_text.split()), row["loss"]))
        if len(candidates) > _MAX_ROWS:
            candidates = _keep_extremes(candidates)
    names = Counter(
        {name: sum(predicted_counts.values()) for name, predicted_counts in counts.items()}
    )
    for predicted_counts in counts.values():
        for name in predicted_counts:
            names.setdefault(name, 0)
    if len(units) != 1 or "" in units or not 1 < len(names) <= MAX_CLASSES:
        names, counts = Counter(), {}
    classes = [name for name, _ in names.most_common()]
    has_loss = all(isinstance(row.get("loss"), int | float) for row in candidates)
    ordered = sorted(candidates, key=lambda row: row["loss"]) if has_loss else candidates
    half = len(ordered) // 2
    incorrect = [row for row in ordered if "true" in row and row.get("predicted") != row["true"]]
    return PredictionStats(
        classes,
        counts,
        [_scores(name, counts, names[name]) for name in classes],
        next(iter(units)) if classes else "rows",
        [] if classes else bin_lengths(sorted(by_length), _NUM_QUANTILES),
        ordered[half:][: -NUM_ROWS - 1 : -1] if has_loss else incorrect[:NUM_ROWS],
        ordered[: max(1, half)][:NUM_ROWS] if has_loss else [],
        total,
    )


def _true_text(row: Mapping[str, Any]) -> str | None:
    """Returns the true answer of a row; the first if a question has several."""
    right = row.get("true", row.get("chosen"))
    if isinstance(right, list) and right and isinstance(row.get("predicted"), str):
        right = right[0]
    return right if isinstance(right, str) else None


def _pairs(true: Any, predicted: Any) -> tuple[str, list[tuple[str, str]]]:
    """Returns the unit (`rows`, `words` or "") and (true, predicted) classes of a row."""
    if isinstance(true, str) and isinstance(predicted, str):
        return "rows", [(true, predicted)]
    if isinstance(true, list) and isinstance(predicted, list) and len(true) == len(predicted):
        pairs = list(zip(true, predicted, strict=True))
        if all(isinstance(tag, str) for pair in pairs for tag in pair):
            return "words", pairs
    return "", []


_MAX_ROWS = 20_000  # rows in memory, then reduced to the extremes


def _keep_extremes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not all(isinstance(row.get("loss"), int | float) for row in rows):
        return [row for row in rows if row.get("predicted") != row.get("true")][:NUM_ROWS]
    rows.sort(key=lambda row: row["loss"])
    return rows[:NUM_ROWS] + rows[-NUM_ROWS:]


def _scores(
    name: str, counts: Mapping[str, Counter[str]], rows: int
) -> tuple[str, float, float, float, int]:
    hit = counts.get(name, Counter())[name]
    num_predicted = sum(predicted_counts[name] for predicted_counts in counts.values())
    precision, recall = hit / num_predicted if num_predicted else 0.0, hit / rows if rows else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
    return name, precision, recall, f1, rows


@dataclass(frozen=True)
class ReportedRun:
    """What the report shows of a run, read from its files.

    `answers` is None without scored rows, `retrieval` without scored queries, and `rollouts` if the
    run sampled no completions.
    """

    name: str
    path: Path
    summary: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    answers: PredictionStats | None = None
    rollouts: Any = None
    retrieval: RetrievalStats | None = None


def load_run(path: Path, predictions: Path | None = None) -> ReportedRun:
    """Load the finished run in `path`; raises InputError if that is no run or a file is invalid.

    `predictions` is a file of `ftlevel evaluate --predictions`; None uses the validation rows.
    """
    if not (path / SUMMARY).is_file():
        if (path / CONFIG).is_file():
            raise InputError(
                f"{path} is an unfinished run: it has no {SUMMARY}. Resume it: "
                f"ftlevel train --output-dir {quote(str(path))} --resume"
            )
        reason = f"it has no {SUMMARY}" if path.is_dir() else "no such directory"
        raise InputError(f"{path} is not a run: {reason}. Expected an --output-dir of training.")
    summary = read_json(path / SUMMARY)
    records = list(_load_json_lines(path / METRICS)) if (path / METRICS).is_file() else []
    if predictions is None and (path / ANSWERS).is_file():
        predictions = path / ANSWERS
    load_rows = partial(_load_json_lines, predictions) if predictions is not None else None
    run = create_reported_run(path, summary, records, load_rows)
    if run.answers and not run.answers.total and predictions != path / ANSWERS:
        raise InputError(f"{predictions} is empty. Expected rows of evaluate --predictions.")
    return run


def create_reported_run(
    path: Path,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    load_rows: Callable[[], Iterable[dict[str, Any]]] | None,
) -> ReportedRun:
    """Returns the `ReportedRun` in `path`; `load_rows` yields predictions, and is called twice."""
    answers = retrieval = None
    if load_rows is not None and (retrieval := compute_retrieval_stats(load_rows())) is None:
        answers = compute_prediction_stats(load_rows(), summary.get("data", {}).get("problem_type"))
    summaries = (summarize(path) for summarize in hooks("summarize_samples"))
    rollouts = next((summary for summary in summaries if summary is not None), None)
    return ReportedRun(path.resolve().name, path, summary, records, answers, rollouts, retrieval)


def _load_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    value = json.loads(line)
                except ValueError:
                    if line.endswith("\n"):  # else a killed process truncated the last line
                        raise InputError(f"{path}:{number}: not valid JSON.") from None
                    return
                if isinstance(value, dict):
                    yield value
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}).") from None
