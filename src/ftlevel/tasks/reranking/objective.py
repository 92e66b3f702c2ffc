"""Loss and metrics of rerankers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftlevel.objectives import Meter, Objective
from ftlevel.tasks.embedding.retrieval import (
    DEEPEST,
    average_precision,
    rank_relevant,
    score_ranks,
    spearman,
)
from ftlevel.tasks.reranking.losses import Lists, count_targets, sum_loss

if TYPE_CHECKING:
    import torch

RANKING_METRICS = ("ndcg@10", "mrr@10", "map")


@dataclass(frozen=True)
class Ranking(Objective):
    """Objective of rerankers: logits `(documents, 1)`, labels as in `Lists.from_labels`.

    Attributes:
        loss: key of `config.reranking.LOSSES`.
        pos_weight: weight of relevant documents in bce.
    """

    loss: str = "lce"
    pos_weight: float = 1.0

    per_row: ClassVar[bool] = True
    has_choice: ClassVar[bool] = False

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Count the loss's targets: documents, relevant documents, lists or pairs (a scalar)."""
        return count_targets(self.loss, Lists.from_labels(labels))

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return sum_loss(self.loss, logits, Lists.from_labels(labels), self.pos_weight)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics; the meter omits those that are undefined for the labels."""
        return (*RANKING_METRICS, "average_precision", "spearman")

    def meter(self) -> Meter:
        return RankingMeter()


@dataclass(frozen=True)
class CandidateGroup:
    """Scores and labels of the documents of one query."""

    scores: Sequence[float] = ()
    labels: Sequence[float] = ()

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Ranking metrics; empty without both a relevant and an irrelevant document."""
        labels = np.array(self.labels)
        relevant = np.flatnonzero(labels > 0)
        if not len(relevant) or len(relevant) == len(labels):
            return {}
        grades = dict(zip(relevant.tolist(), labels[relevant].tolist(), strict=True))
        ranks = rank_relevant(np.array(self.scores), grades)
        scores = score_ranks(ranks, max(len(labels), DEEPEST))
        return {name: scores["map@100" if name == "map" else name] for name in RANKING_METRICS}


class RankingMeter:
    """Meter of rerankers: ranking metrics of each query, and a metric over all pairs.

    Queries without both a relevant and an irrelevant document are omitted. The metric over all
    (query, document) pairs is `average_precision` for labels 0 and 1, else `spearman`.
    """

    def __init__(self) -> None:
        self._groups: dict[Any, CandidateGroup] = {}

    def update(self, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Any]) -> None:
        """Add the documents of `rows`, with logits `(documents, 1)` and labels `(documents, 3)`."""
        scores = logits.detach().cpu().double().flatten().tolist()
        own = labels[:, 0].cpu().tolist()
        at = 0
        for row in rows:
            end = at + len(row.sizes)
            self._add(row.group, scores[at:end], own[at:end])
            at = end

    def merge(self, other: RankingMeter) -> None:
        for key, group in other._groups.items():
            self._add(key, group.scores, group.labels)

    def _add(self, key: Any, scores: Sequence[float], labels: Sequence[float]) -> None:
        group = self._groups.get(key, CandidateGroup())
        self._groups[key] = CandidateGroup([*group.scores, *scores], [*group.labels, *labels])

    def pool(self, meters: Sequence[RankingMeter]) -> RankingMeter:
        """Returns a meter of the queries of all `meters`; equal queries are not combined."""
        pooled = RankingMeter()
        pooled._groups = {
            (number, key): group
            for number, meter in enumerate(meters)
            for key, group in meter._groups.items()
        }
        return pooled

    def compute(self, loss: float) -> dict[str, float]:
        """Compute the means over queries, and the metrics over all pairs."""
        metrics = [group.metrics for group in self._groups.values()]
        ranked = [one for one in metrics if one]
        names = RANKING_METRICS if ranked else ()
        found = {name: float(np.mean([one[name] for one in ranked])) for name in names}
        scores = [score for group in self._groups.values() for score in group.scores]
        labels = [label for group in self._groups.values() for label in group.labels]
        if len(set(labels)) > 1:
            if set(labels) <= {0.0, 1.0}:
                found["average_precision"] = average_precision(scores, labels)
            elif len(set(scores)) > 1:
                found["spearman"] = spearman(scores, labels)
        return found

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        group = next(iter(self._groups.values()))
        scores = [round(score, 4) for score in group.scores]
        return {"scores": scores, "labels": group.labels, **group.metrics}


def get_loss_config(data_info: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the loss settings in the data info of a run or the options of a model card."""
    values: Mapping[str, Any] = data_info.get("reranking") or {}
    return values
