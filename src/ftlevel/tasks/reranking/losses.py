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
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MU = 10.0
"""Weight of NDCG-Loss2 beside LambdaRank in NDCG-Loss2++."""


@dataclass(frozen=True)
class Lists:
    """Labels and teacher's scores of several queries' documents, one padded list per query.

    `labels`, `teacher` and `mask` are `(lists, longest)`; `positions` are the indices of the
    documents in the flattened tensors.
    """

    labels: torch.Tensor
    teacher: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def from_labels(cls, labels: torch.Tensor) -> Lists:
        """Returns the lists of documents with `labels` `(documents, 3)`: label, teacher, list size.

        The first document of a list has the list's size, the others 0.
        """
        import torch

        sizes = labels[:, 2].long()
        sizes = sizes[sizes > 0]
        column = torch.arange(int(sizes.max()), device=labels.device)
        mask = column[None] < sizes[:, None]
        positions = mask.flatten().nonzero().flatten()
        empty = labels.new_zeros(mask.numel())
        padded = [
            empty.index_copy(0, positions, labels[:, at]).view_as(mask).float() for at in (0, 1)
        ]
        return cls(padded[0], padded[1], mask, positions)

    def pad(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns `logits` (documents,) as float32 (lists, longest), padded with 0."""
        import torch

        padded = logits.new_zeros(self.mask.numel(), dtype=torch.float32)
        return padded.index_copy(0, self.positions, logits.float().flatten()).view_as(self.mask)

    @property
    def pairs(self) -> torch.Tensor:
        """Mask (lists, longest, longest): document i has a higher label than document j."""
        both = self.mask[:, :, None] & self.mask[:, None, :]
        return both & (self.labels[:, :, None] > self.labels[:, None, :])

    @property
    def relevant(self) -> torch.Tensor:
        """Mask (lists, longest): the label is above 0."""
        return self.mask & (self.labels > 0)

    @property
    def irrelevant(self) -> torch.Tensor:
        """Mask (lists, longest): the label is 0 or less."""
        return self.mask & (self.labels <= 0)

    @property
    def taught(self) -> torch.Tensor:
        """Mask (lists, longest): the teacher's score is known."""
        return self.mask & ~self.teacher.isnan()

    @property
    def margins(self) -> torch.Tensor:
        """Mask (lists, longest, longest): i is relevant, j is not; both have a teacher's score."""
        good, bad = self.relevant & self.taught, self.irrelevant & self.taught
        return good[:, :, None] & bad[:, None, :]


def count_targets(loss: str, lists: Lists) -> torch.Tensor:
    """Returns the number of targets of `loss`, by which its sum is divided (a scalar)."""
    if loss == "bce":
        return lists.mask.sum()
    if loss == "mse":
        return lists.taught.sum()
    if loss == "lce":
        return lists.relevant.sum()
    if loss == "listnet":
        return lists.mask.any(1).sum()
    if loss == "margin-mse":
        return lists.margins.sum()
    return lists.pairs.sum()


def sum_loss(loss: str, logits: torch.Tensor, lists: Lists, pos_weight: float) -> torch.Tensor:
    """Returns the loss named `loss` of `logits` (documents,), summed over targets in float32."""
    from torch.nn import functional

    z, mask = lists.pad(logits), lists.mask
    if loss == "bce":
        return functional.binary_cross_entropy_with_logits(
            z[mask], lists.labels[mask], pos_weight=z.new_tensor(pos_weight), reduction="sum"
        )
    if loss == "mse":
        return functional.mse_loss(z[lists.taught], lists.teacher[lists.taught], reduction="sum")
    if loss == "lce":
        others = z.masked_fill(~lists.irrelevant, -math.inf).logsumexp(1, keepdim=True)
        return (z.logaddexp(others) - z)[lists.relevant].sum()
    if loss == "listnet":
        target_probs = lists.labels.masked_fill(~mask, -math.inf).softmax(1)
        log_probs = z.masked_fill(~mask, -math.inf).log_softmax(1)
        return -(target_probs * log_probs.masked_fill(~mask, 0)).sum()
    if loss == "margin-mse":
        margins = _differences(z)[lists.margins] - _differences(lists.teacher)[lists.margins]
        return margins.square().sum()
    lost = functional.softplus(-_differences(z)) / math.log(2)
    if loss == "lambda":
        lost = lost * _ndcg_weights(z.detach(), lists)
    return lost[lists.pairs].sum()


def _differences(values: torch.Tensor) -> torch.Tensor:
    return values[:, :, None] - values[:, None, :]


def _ndcg_weights(logits: torch.Tensor, lists: Lists) -> torch.Tensor:
    """Returns the weight of each pair, (lists, longest, longest).

    With ranks r by logit, gains G = (2^y - 1) / maxDCG and discounts D(r) = log₂(1 + r):
    |Gᵢ - Gⱼ| · (μ |1 / D(|rᵢ - rⱼ|) - 1 / D(|rᵢ - rⱼ| + 1)| + |1 / D(rᵢ) - 1 / D(rⱼ)|).
    """
    import torch

    mask = lists.mask
    labels = lists.labels.clamp(min=0).masked_fill(~mask, 0)
    ranks = torch.arange(1, mask.shape[1] + 1, device=logits.device, dtype=torch.float32)
    best = ((2 ** labels.sort(1, descending=True).values - 1) / (1 + ranks).log2()).sum(1)
    gains = (2**labels - 1) / best.clamp(min=1e-10)[:, None]
    order = logits.masked_fill(~mask, -math.inf).argsort(1, descending=True)
    own = torch.zeros_like(logits).scatter_(1, order, ranks.expand_as(logits))
    inverse = 1 / (1 + own).log2()
    distance = _differences(own).abs()
    distances = distance.clamp(min=1)
    delta = (
        (1 / (1 + distances).log2() - 1 / (2 + distances).log2())
        .abs()
        .masked_fill(distance == 0, 0)
    )
    return _differences(gains).abs() * (MU * delta + _differences(inverse).abs())
