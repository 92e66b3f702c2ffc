"""Metrics that are summed up batch by batch, so that no logits outlive their batch.

A meter takes a batch's logits and labels in `update` and gives the figures in `compute`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

IGNORED = -100


class TokenMeter:
    """Mean negative log likelihood over supervised tokens, and what follows from it.

    Args:
        shifted: whether the label of position i is predicted at position i - 1 (causal models).
    """

    def __init__(self, shifted: bool) -> None:
        self.shifted = shifted
        self.nats = 0.0
        self.tokens = 0
        self.right = 0

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: logits `(batch, seq, vocabulary)`, labels `(batch, seq)` with -100."""
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        supervised = labels != IGNORED
        scores, targets = logits[supervised].float(), labels[supervised]
        self.nats += functional.cross_entropy(scores, targets, reduction="sum").item()
        self.right += int((scores.argmax(-1) == targets).sum())
        self.tokens += targets.numel()

    def compute(self) -> dict[str, float]:
        """Return loss (nats a token), perplexity and token accuracy."""
        if not self.tokens:
            return {"loss": math.nan, "perplexity": math.nan, "token_accuracy": math.nan}
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "token_accuracy": self.right / self.tokens,
        }


class LabelMeter:
    """Cross entropy, accuracy and macro F1 of single-label classification."""

    def __init__(self) -> None:
        self.nats = 0.0
        self.predicted: list[int] = []
        self.true: list[int] = []

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: logits `(batch, classes)`, labels `(batch,)`."""
        scores = logits.float()
        self.nats += functional.cross_entropy(scores, labels, reduction="sum").item()
        self.predicted += scores.argmax(-1).tolist()
        self.true += labels.tolist()

    def compute(self) -> dict[str, float]:
        """Return loss, accuracy and F1, its mean over the classes that occur."""
        from sklearn.metrics import accuracy_score, f1_score

        return {
            "loss": self.nats / max(len(self.true), 1),
            "accuracy": float(accuracy_score(self.true, self.predicted)),
            "f1": float(f1_score(self.true, self.predicted, average="macro", zero_division=0)),
        }


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return mean ROUGE-1, -2 and -L F1 between 0 and 1 (Lin, 2004), with Porter stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(r, p) for r, p in zip(references, predictions, strict=True)]
    return {name: sum(s[name].fmeasure for s in scores) / len(scores) for name in names}
