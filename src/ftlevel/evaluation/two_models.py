"""How far what one model said is from what another said: KL, top-1 agreement, loss, differences.

On rows, both are compared at each supervised target; on text, at each position, where a model
without a language head is compared by its hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ftlevel.evaluation.two_models.on_rows import Scores
from ftlevel.evaluation.two_models.on_text import HIDDEN_STATES, PREDICTS, Answer


@dataclass(frozen=True)
class Agreement:
    """How far a model is from another; the other one is the reference.

    Attributes:
        max_difference: largest |logit difference|.
        mean_difference: mean |logit difference|.
        scale: largest |logit| of the reference.
        kl: mean KL divergence of its choice from the reference's, in nats; None of scores, between
            which nothing is chosen.
        top1: share of targets with the same first choice; None likewise.
        loss: its loss.
        loss_reference: the reference's loss.
        targets: how many targets were compared.
    """

    max_difference: float
    mean_difference: float
    scale: float
    kl: float | None
    top1: float | None
    loss: float
    loss_reference: float
    targets: int

    @property
    def distance(self) -> float:
        """What tells which of several models is nearest: KL, or the mean difference of scores."""
        return self.mean_difference if self.kl is None else self.kl


def compare_rows(reference: Scores, found: Scores) -> Agreement:
    """Return how far `found` is from `reference`; both are of the same rows."""
    largest = total = scale = divergence = 0.0
    same = numbers = 0
    for first, second in zip(reference.logits, found.logits, strict=True):
        difference = (second - first).abs()
        largest = max(largest, difference.max().item() if difference.numel() else 0.0)
        scale = max(scale, first.abs().max().item() if first.numel() else 0.0)
        total += difference.sum(dtype=torch.float64).item()
        numbers += difference.numel()
        p, q = functional.log_softmax(first, -1), functional.log_softmax(second, -1)
        divergence += functional.kl_div(q, p, log_target=True, reduction="sum").item()
        same += _count_same_choice(first, second)
    targets = max(reference.targets, 1)
    return Agreement(
        largest, total / max(numbers, 1), scale,
        divergence / targets if reference.has_choice else None,
        same / targets if reference.has_choice else None,
        found.loss, reference.loss, reference.targets,
    )  # fmt: skip


def compare_text(
    source: Iterable[Answer], changed: Iterable[Answer], auto_class: str
) -> dict[str, Any]:
    """Return how the changed model predicts beside its source, asked the same.

    KL is the mean of KL(source ‖ changed) over the positions, in nats, with its standard error;
    top-1 agreement the share of positions where both find the same token most likely. A prediction
    that is not finite makes them NaN.
    """
    scores = _Predictions() if auto_class in PREDICTS else _HiddenStates()
    windows = 0
    for first, second in zip(source, changed, strict=True):
        scores.update(first.values, second.values.to(first.values.device), first.labels)
        windows += 1
    return {
        "predicts": PREDICTS.get(auto_class, HIDDEN_STATES),
        "windows": windows,
        **scores.compute(),
    }


class _Predictions:
    """Sums over the positions of a language model."""

    def __init__(self) -> None:
        self.kl: list[torch.Tensor] = []
        self.agree = 0
        self.nll = [0.0, 0.0]

    def update(self, first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor) -> None:
        """Add logits `(positions, vocabulary)` of both models and the true tokens."""
        before, after = first.log_softmax(-1), second.log_softmax(-1)
        self.kl.append((before.exp() * (before - after)).sum(-1).cpu())
        self.agree += _count_same_choice(before, after)
        for index, scores in enumerate((before, after)):
            true = labels.to(scores.device)
            self.nll[index] += float(functional.nll_loss(scores, true, reduction="sum"))

    def compute(self) -> dict[str, float]:
        """Return the means over all positions."""
        kl = torch.cat(self.kl)
        count = len(kl)
        return {
            "positions": count,
            "kl": float(kl.mean()),
            "kl_standard_error": float(kl.std() / math.sqrt(count)) if count > 1 else math.nan,
            "top1_agreement": self.agree / count,
            "perplexity_source": math.exp(self.nll[0] / count),
            "perplexity": math.exp(self.nll[1] / count),
        }


class _HiddenStates:
    """The angle between the hidden states of both models."""

    def __init__(self) -> None:
        self.cosine: list[torch.Tensor] = []

    def update(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        labels: torch.Tensor,  # noqa: ARG002 - as _Predictions
    ) -> None:
        """Add hidden states `(positions, hidden)`."""
        self.cosine.append(functional.cosine_similarity(first, second, dim=-1).cpu())

    def compute(self) -> dict[str, float]:
        """Return the mean and the smallest cosine over all positions."""
        cosine = torch.cat(self.cosine)
        return {
            "positions": len(cosine),
            "cosine": float(cosine.mean()),
            "cosine_smallest": float(cosine.min()),
        }


def _count_same_choice(first: torch.Tensor, second: torch.Tensor) -> int:
    """Return for how many targets both scores `(targets, choices)` have the same largest one."""
    return int((first.argmax(-1) == second.argmax(-1)).sum())
