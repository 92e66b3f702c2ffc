"""Reranking losses over lists of documents, in float32, summed over their targets.

For the documents of a query, z are logits, y labels and t a teacher's scores:

    bce         Σᵢ -w yᵢ log σ(zᵢ) - (1 - yᵢ) log σ(-zᵢ)
    mse         Σᵢ (zᵢ - tᵢ)²
    lce         Σ over yᵢ > 0 of log(exp zᵢ + Σ over yⱼ = 0 of exp zⱼ) - zᵢ        (2101.08751)
    listnet     -Σᵢ softmax(y)ᵢ log softmax(z)ᵢ                      (Cao et al., 2007)
    ranknet     Σ over yᵢ > yⱼ of log₂(1 + exp(zⱼ - zᵢ))             (Burges et al., 2005)
    lambda      ranknet, weighted by NDCG-Loss2++ with μ = 10        (Wang et al., 2018, eq. 19)
    margin-mse  Σ over yᵢ > 0, yⱼ = 0 of ((zᵢ - zⱼ) - (tᵢ - tⱼ))²    (2010.02666)

The mean of a step divides by all its documents (bce, mse), relevant documents (lce), lists
(listnet) or pairs. Thus no loss depends on the division into micro-batches. Documents without a
teacher's score, which is NaN, are not targets of mse and margin-mse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftlevel.extras.retrieval.metrics import (
    DEEPEST,
    average_precision,
    rank_relevant,
    score_ranks,
    spearman,
)
from ftlevel.objectives import Meter, Objective

if TYPE_CHECKING:
    import torch


MU = 10.0
"""Weight of NDCG-Loss2 beside LambdaRank in NDCG-Loss2++."""


@dataclass(frozen=True)
class Lists:
    """Labels and teacher's scores of several queries' documents.

    Shapes depend on the number of documents only, so that a GPU's host never waits for their
    values: a mask `(documents, documents)` instead of padded lists.

    Attributes:
        labels: `(documents,)`.
        teacher: `(documents,)`, 0 where it is unknown.
        taught: mask `(documents,)`: the teacher's score is known.
        first: mask `(documents,)`: the first document of a list.
        same: mask `(documents, documents)`: both documents are in the same list.
    """

    labels: torch.Tensor
    teacher: torch.Tensor
    taught: torch.Tensor
    first: torch.Tensor
    same: torch.Tensor

    @classmethod
    def from_labels(cls, labels: torch.Tensor) -> Lists:
        """Returns the lists of documents with `labels` `(documents, 3)`: label, teacher, list size.

        The first document of a list has the list's size, the others 0.
        """
        own, teacher, sizes = labels.float().unbind(1)
        index = (sizes > 0).cumsum(0)
        same = index[:, None] == index[None, :]
        return cls(own, teacher.nan_to_num(0.0), ~teacher.isnan(), sizes > 0, same)

    @property
    def pairs(self) -> torch.Tensor:
        """Mask (documents, documents): i and j are in one list, and i has a higher label."""
        return self.same & (self.labels[:, None] > self.labels[None, :])

    @property
    def margins(self) -> torch.Tensor:
        """Mask (documents, documents): i is relevant, j is not; both have a teacher's score."""
        relevant = self.labels > 0
        return self.same & (relevant & self.taught)[:, None] & (~relevant & self.taught)[None, :]


def count_targets(loss: str, lists: Lists) -> torch.Tensor:
    """Returns the number of targets of `loss`, by which its sum is divided (a scalar)."""
    if loss == "bce":
        return lists.labels.new_full((), len(lists.labels))
    if loss == "mse":
        return lists.taught.sum()
    if loss == "lce":
        return (lists.labels > 0).sum()
    if loss == "listnet":
        return lists.first.sum()
    if loss == "margin-mse":
        return lists.margins.sum()
    return lists.pairs.sum()


def sum_loss(loss: str, logits: torch.Tensor, lists: Lists, pos_weight: float) -> torch.Tensor:
    """Returns the loss named `loss` of `logits` (documents,), summed over targets in float32."""
    from torch.nn import functional

    z, labels = logits.float().flatten(), lists.labels
    if loss == "bce":
        weight = z.new_full((), pos_weight)
        return functional.binary_cross_entropy_with_logits(
            z, labels, pos_weight=weight, reduction="sum"
        )
    if loss == "mse":
        return ((z - lists.teacher) * lists.taught).square().sum()
    if loss == "lce":
        others = _logsumexp(z, lists.same & (labels <= 0)[None, :])
        return (z.logaddexp(others) - z).masked_fill(labels <= 0, 0).sum()
    if loss == "listnet":
        target_probs = (labels - _logsumexp(labels, lists.same)).exp()
        return (target_probs * (_logsumexp(z, lists.same) - z)).sum()
    if loss == "margin-mse":
        margins = _differences(z) - _differences(lists.teacher)
        return (margins * lists.margins).square().sum()
    lost = functional.softplus(-_differences(z)) / math.log(2)
    if loss == "lambda":
        lost = lost * _ndcg_weights(z.detach(), lists)
    return (lost * lists.pairs).sum()


def _differences(values: torch.Tensor) -> torch.Tensor:
    return values[:, None] - values[None, :]


def _logsumexp(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns log Σⱼ exp(values[j]) over the columns of each row of `mask`; -inf for none."""
    return values.expand(mask.shape).masked_fill(~mask, -math.inf).logsumexp(1)


def _ranks(values: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Returns each document's rank in its list by descending `values`, from 1; ties in order."""
    import torch

    before = torch.ones_like(same).tril(-1)  # document j comes before i
    above = (values[None, :] > values[:, None]) | ((values[None, :] == values[:, None]) & before)
    return 1.0 + (same & above).sum(1)


def _ndcg_weights(logits: torch.Tensor, lists: Lists) -> torch.Tensor:
    """Returns the weight of each pair, (documents, documents).

    With ranks r by logit, gains G = (2^y - 1) / maxDCG and discounts D(r) = log₂(1 + r):
    |Gᵢ - Gⱼ| · (μ |1 / D(|rᵢ - rⱼ|) - 1 / D(|rᵢ - rⱼ| + 1)| + |1 / D(rᵢ) - 1 / D(rⱼ)|).
    """
    labels, same = lists.labels.clamp(min=0), lists.same
    gains = 2**labels - 1
    best = same.to(gains.dtype) @ (gains / (1 + _ranks(labels, same)).log2())
    gains = gains / best.clamp(min=1e-10)
    own = _ranks(logits, same)
    inverse = 1 / (1 + own).log2()
    distance = _differences(own).abs()
    distances = distance.clamp(min=1)
    delta = (
        (1 / (1 + distances).log2() - 1 / (2 + distances).log2())
        .abs()
        .masked_fill(distance == 0, 0)
    )
    return _differences(gains).abs() * (MU * delta + _differences(inverse).abs())


RANKING_METRICS = ("ndcg@10", "mrr@10", "map")


@dataclass(frozen=True)
class Ranking(Objective):
    """Objective of rerankers: logits `(documents, 1)`, labels as in `Lists.from_labels`.

    Attributes:
        loss: key of `config.RERANKING_LOSSES`.
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
