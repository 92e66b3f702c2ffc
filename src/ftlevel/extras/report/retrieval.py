"""Summarize the scored queries of embedding models and rerankers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BANDS = 12
SHOWN = 10
SERIES = {
    "base_positive": "positives before",
    "positive": "positives",
    "base_negative": "best negatives before",
    "negative": "best negatives",
}
"""Prefix of a score's field → its heading."""


@dataclass(frozen=True)
class RetrievalFacts:
    """Scores of validation queries.

    Attributes:
        series: headings of the counted scores.
        bands: lower bound, upper bound, and number of scores of each series.
        worst: queries with the lowest nDCG@10, then with the closest negative.
        total: number of queries.
    """

    series: list[str]
    bands: list[tuple[float, float, list[int]]]
    worst: list[dict[str, Any]]
    total: int

    @property
    def largest(self) -> int:
        """Largest number of scores in a band."""
        return max(count for _, _, counts in self.bands for count in counts)


def summarize_retrieval(rows: Iterable[dict[str, Any]]) -> RetrievalFacts | None:
    """Return the facts of `rows` with scores of positives and negatives; None without such rows."""
    scored = [row | scores for row in rows if (scores := _scores(row))]
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
    return RetrievalFacts(list(values), _bands(list(values.values())), worst[:SHOWN], len(scored))


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the best scores of a row's positives and negatives, with those before training."""
    found: dict[str, float] = {}
    for base in ("", "base_"):
        names = [f"{base}positive_score", f"{base}negative_score"]
        scores, labels = row.get(f"{base}scores"), row.get("labels")
        if all(name in row for name in names):
            found |= {name: row[name] for name in names}
        elif isinstance(scores, list) and isinstance(labels, list):  # of a reranker
            good = [s for s, label in zip(scores, labels, strict=True) if label > 0]
            bad = [s for s, label in zip(scores, labels, strict=True) if label <= 0]
            if good and bad:
                found |= dict(zip(names, (max(good), max(bad)), strict=True))
    return found if "positive_score" in found else {}


def _bands(series: Sequence[Sequence[float]]) -> list[tuple[float, float, list[int]]]:
    low, high = min(map(min, series)), max(map(max, series))
    width = (high - low) / BANDS or 1.0
    counts = [[0] * len(series) for _ in range(BANDS)]
    for number, scores in enumerate(series):
        for score in scores:
            counts[min(BANDS - 1, int((score - low) / width))][number] += 1
    return [(low + at * width, low + (at + 1) * width, row) for at, row in enumerate(counts)]


def list_dimensions(summary: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """Return nDCG@10 by number of Matryoshka dimensions: dimensions, value, value before."""
    before = summary.get("metrics_before", {})
    return [
        (name.rpartition("_")[2], value, before.get(name))
        for name, value in summary.get("metrics", {}).items()
        if name.startswith("ndcg@10_dim_")
    ]
