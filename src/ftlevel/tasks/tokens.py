"""Objective and meter of language heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftlevel.task import IGNORED, Meter, TokenObjective

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tokens(TokenObjective):
    """Cross entropy over tokens: logits `(batch, seq, vocabulary)`, labels `(batch, seq)`.

    With `shifted`, position i - 1 predicts the label of position i, as in causal models.
    `perplexity` and `accuracy` are metric names.
    """

    shifted: bool = False
    perplexity: str = "perplexity"
    accuracy: str = "token_accuracy"

    def targets(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(tokens, vocabulary)` logits and `(tokens,)` labels of the supervised tokens."""
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        supervised = labels != IGNORED
        return logits[supervised], labels[supervised]

    def locate(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where targets are predicted in the flattened `(batch, seq)`, and the targets."""
        from torch.nn import functional

        if self.shifted:
            labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        flat = labels.flatten()
        at = (flat != IGNORED).nonzero()[:, 0]
        return at, flat[at]

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the number of supervised tokens."""
        return super().count(labels[:, 1:] if self.shifted else labels)

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of the negative log-likelihoods, in nats."""
        from torch.nn import functional

        scores, targets = self.targets(logits, labels)
        return functional.cross_entropy(scores.float(), targets, reduction="sum")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Perplexity and accuracy."""
        return self.perplexity, self.accuracy

    def meter(self) -> Meter:
        """Return a `TokenMeter`."""
        return TokenMeter(self.perplexity, self.accuracy)


class TokenMeter:
    """Perplexity and accuracy over supervised tokens; both arguments are metric names."""

    def __init__(self, perplexity: str, accuracy: str) -> None:
        self.perplexity = perplexity
        self.accuracy = accuracy
        self.tokens = 0
        self.right = 0

    def update(self, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Any]) -> None:
        """Add a batch's supervised tokens: logits `(tokens, vocabulary)`, labels `(tokens,)`."""
        self.right += int((logits.argmax(-1) == labels).sum())
        self.tokens += labels.numel()

    def compute(self, loss: float) -> dict[str, float]:
        """Return perplexity and accuracy."""
        return {
            self.perplexity: math.exp(loss) if loss < 700 else math.inf,
            self.accuracy: self.right / self.tokens if self.tokens else math.nan,
        }

    def pool(self, meters: Sequence[TokenMeter]) -> TokenMeter:
        """Return a meter of the tokens of all `meters`."""
        pooled = TokenMeter(self.perplexity, self.accuracy)
        pooled.tokens = sum(meter.tokens for meter in meters)
        pooled.right = sum(meter.right for meter in meters)
        return pooled

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the number of tokens of an example, and of correct ones."""
        return {"tokens": self.tokens, "tokens_right": self.right}
