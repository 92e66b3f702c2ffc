"""What a model is trained on, one class an output shape: its loss, its targets and its meter.

A loss is a sum over targets and goes with their number, so that the loss of an optimizer step is
the mean over the targets of all its micro-batches, however they were cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ftlevel.task import Task
from ftlevel.tasks.meters import (
    ClassMeter,
    Meter,
    MultiLabelMeter,
    RegressionMeter,
    SpanMeter,
    TagMeter,
    TokenMeter,
)

IGNORED = -100
Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Objective(ABC):
    """How the outputs of a model and the labels of a batch become a loss and metrics.

    Attributes:
        headline: the metric that is shown first.
        feeds_labels: whether the model needs the labels to build its decoder's inputs.
    """

    headline: str
    feeds_labels: bool = False

    def split(self, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return what the model is called with, and the labels."""
        inputs = dict(batch)
        labels = inputs["labels"] if self.feeds_labels else inputs.pop("labels")
        return inputs, labels

    def logits(self, outputs: Any) -> torch.Tensor:
        """Return the scores of a model's outputs, in the shape that the other methods take."""
        return outputs.logits

    def targets(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and labels of the supervised targets only."""
        return logits, labels

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the number of targets (a scalar)."""
        return labels.ne(IGNORED).sum()

    @abstractmethod
    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss summed over the targets (a scalar, float32).

        Args:
            logits: as `logits` gave them.
            labels: as `split` gave them.
            mask: the attention mask `(batch, seq)`.
        """

    @abstractmethod
    def meter(self) -> Meter:
        """Return a new meter; it is updated with what `targets` returns."""


@dataclass(frozen=True)
class Tokens(Objective):
    """Cross entropy over tokens: logits `(batch, seq, vocabulary)`, labels `(batch, seq)`.

    Attributes:
        shifted: whether the label of position i is predicted at position i - 1 (causal models).
        perplexity: what exp(loss) is called.
        accuracy: what the share of right tokens is called.
    """

    shifted: bool = False
    perplexity: str = "perplexity"
    accuracy: str = "token_accuracy"

    def targets(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(tokens, vocabulary)` and `(tokens,)` of the supervised tokens."""
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        supervised = labels != IGNORED
        return logits[supervised], labels[supervised]

    def locate(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where targets are predicted in the flattened (batch, seq), and the targets."""
        if self.shifted:
            labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        flat = labels.flatten()
        at = (flat != IGNORED).nonzero()[:, 0]
        return at, flat[at]

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the number of supervised tokens that are predicted."""
        return super().count(labels[:, 1:] if self.shifted else labels)

    def loss_sum(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,  # noqa: ARG002 - as `Objective`
    ) -> torch.Tensor:
        """Return the sum of the negative log likelihoods, in nats."""
        scores, targets = self.targets(logits, labels)
        return functional.cross_entropy(scores.float(), targets, reduction="sum")

    def meter(self) -> Meter:
        """Return a `TokenMeter`."""
        return TokenMeter(self.perplexity, self.accuracy)


@dataclass(frozen=True)
class Tags(Objective):
    """Cross entropy over words: logits `(batch, seq, tags)`, labels `(batch, seq)`."""

    names: tuple[str, ...] = ()

    def loss_sum(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,  # noqa: ARG002 - as `Objective`
    ) -> torch.Tensor:
        """Return the sum of the negative log likelihoods of the words' tags, in nats."""
        return functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def meter(self) -> Meter:
        """Return a `TagMeter`."""
        return TagMeter(self.names)


@dataclass(frozen=True)
class Classes(Objective):
    """Cross entropy over rows: logits `(batch, classes)`, labels `(batch,)`."""

    def loss_sum(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,  # noqa: ARG002 - as `Objective`
    ) -> torch.Tensor:
        """Return the sum of the negative log likelihoods, in nats."""
        return functional.cross_entropy(logits.float(), labels, reduction="sum")

    def meter(self) -> Meter:
        """Return a `ClassMeter`."""
        return ClassMeter()


@dataclass(frozen=True)
class MultiLabel(Objective):
    """Binary cross entropy over rows and classes: logits and float labels `(batch, classes)`."""

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Return rows times classes."""
        return torch.tensor(labels.numel())

    def loss_sum(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,  # noqa: ARG002 - as `Objective`
    ) -> torch.Tensor:
        """Return the sum over every class of every row, in nats."""
        return functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")

    def meter(self) -> Meter:
        """Return a `MultiLabelMeter`."""
        return MultiLabelMeter()


@dataclass(frozen=True)
class Regression(Objective):
    """Squared error over rows: logits `(batch, 1)`, float labels `(batch,)`."""

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the number of rows; -100.0 is a number like any other."""
        return torch.tensor(labels.numel())

    def loss_sum(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,  # noqa: ARG002 - as `Objective`
    ) -> torch.Tensor:
        """Return the sum of the squared errors."""
        return functional.mse_loss(logits.float().squeeze(-1), labels, reduction="sum")

    def meter(self) -> Meter:
        """Return a `RegressionMeter`."""
        return RegressionMeter()


@dataclass(frozen=True)
class Spans(Objective):
    """Cross entropy over the first and the last token of an answer.

    Logits are `(batch, seq, 2)`, labels `(batch, 2)`. Unlike transformers' own loss, padding is no
    candidate: with it, a row's loss would depend on the rows that it is batched with.

    Attributes:
        unanswerable: whether "no answer" may be predicted.
    """

    unanswerable: bool = False

    def logits(self, outputs: Any) -> torch.Tensor:
        """Return start and end logits side by side."""
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of the negative log likelihoods of starts and ends, in nats."""
        scores = logits.float().masked_fill(mask[..., None] == 0, torch.finfo(torch.float32).min)
        return functional.cross_entropy(scores, labels, reduction="sum")

    def meter(self) -> Meter:
        """Return a `SpanMeter`."""
        return SpanMeter(self.unanswerable)


def build_objective(
    task: Task,
    kind: str,
    *,
    problem_type: str | None = None,
    labels: Sequence[str] = (),
    unanswerable: bool = False,
) -> Objective:
    """Return the objective of `task` on a model of `kind`.

    Args:
        task: the task.
        kind: encoder, decoder or encoder-decoder.
        problem_type: of text classification, by transformers' name.
        labels: names of the tags.
        unanswerable: whether questions may have no answer.
    """
    if task.target == "text":
        return Tokens(task.headline, kind == "encoder-decoder", kind == "decoder")
    if task.target == "mask":
        return Tokens(task.headline, perplexity="pseudo_perplexity", accuracy="masked_accuracy")
    if task.target == "tags":
        return Tags(task.headline, names=tuple(labels))
    if task.target == "span":
        return Spans(task.headline, unanswerable=unanswerable)
    if problem_type == "multi_label_classification":
        return MultiLabel("micro_f1")
    if problem_type == "regression":
        return Regression("pearson")
    return Classes(task.headline)
