"""Metrics that are summed up batch by batch, so that no logits outlive their batch.

A meter takes a batch's logits, labels and rows in `update`, and gives its figures in `compute`.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch

from ftlevel.tasks.entities import are_entity_tags, score_entities
from ftlevel.tasks.squad import Found, exact_match, f1, update_found

P = TypeVar("P", bound="_Pairs")


class Meter(Protocol):
    """What the evaluator needs of a meter; the mean loss is computed beside it."""

    def update(self, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Any]) -> None:
        """Add a batch of encoded `rows`."""

    def compute(self, loss: float) -> dict[str, float]:
        """Return the metrics but the loss; `loss` is the mean over all targets."""

    def pool(self, meters: Sequence[Any]) -> Meter:
        """Return a new meter of this kind that has seen what each of `meters` has seen."""


class TokenMeter:
    """Perplexity and accuracy over supervised tokens.

    Args:
        perplexity: what exp(loss) is called.
        accuracy: what the share of tokens is called that were the most likely ones.
    """

    def __init__(self, perplexity: str, accuracy: str) -> None:
        self.perplexity = perplexity
        self.accuracy = accuracy
        self.tokens = 0
        self.right = 0

    def update(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        rows: Sequence[Any],  # noqa: ARG002 - as `Meter`
    ) -> None:
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
        """Return a meter of all their tokens."""
        pooled = TokenMeter(self.perplexity, self.accuracy)
        pooled.tokens = sum(meter.tokens for meter in meters)
        pooled.right = sum(meter.right for meter in meters)
        return pooled


class _Pairs:
    """What was predicted and what is true, row by row."""

    def __init__(self) -> None:
        self.predicted: list[Any] = []
        self.true: list[Any] = []

    def pool(self: P, meters: Sequence[P]) -> P:
        """Return a meter of all their rows."""
        pooled = copy.copy(self)
        pooled.predicted = [value for meter in meters for value in meter.predicted]
        pooled.true = [value for meter in meters for value in meter.true]
        return pooled


class ClassMeter(_Pairs):
    """Accuracy, macro F1 and Matthews' correlation of single-label classification."""

    def update(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        rows: Sequence[Any],  # noqa: ARG002 - as `Meter`
    ) -> None:
        """Add a batch: logits `(batch, classes)`, labels `(batch,)`."""
        self.predicted += logits.argmax(-1).tolist()
        self.true += labels.tolist()

    def compute(self, loss: float) -> dict[str, float]:  # noqa: ARG002 - as `Meter`
        """Return accuracy, F1 (its mean over the classes that occur) and MCC (-1 to 1)."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        return {
            "accuracy": float(accuracy_score(self.true, self.predicted)),
            "f1": float(f1_score(self.true, self.predicted, average="macro", zero_division=0)),
            "mcc": float(matthews_corrcoef(self.true, self.predicted)),
        }


class MultiLabelMeter(_Pairs):
    """F1 and subset accuracy of labels that are told apart at a probability of one half."""

    def update(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        rows: Sequence[Any],  # noqa: ARG002 - as `Meter`
    ) -> None:
        """Add a batch: logits and labels (0.0 or 1.0) `(batch, classes)`."""
        self.predicted += (logits > 0).int().tolist()
        self.true += labels.int().tolist()

    def compute(self, loss: float) -> dict[str, float]:  # noqa: ARG002 - as `Meter`
        """Return micro and macro F1, and the share of rows whose labels are all right."""
        from sklearn.metrics import f1_score

        rows = list(zip(self.true, self.predicted, strict=True))
        return {
            "micro_f1": float(
                f1_score(self.true, self.predicted, average="micro", zero_division=0)
            ),
            "macro_f1": float(
                f1_score(self.true, self.predicted, average="macro", zero_division=0)
            ),
            "subset_accuracy": sum(t == p for t, p in rows) / len(rows),
        }


class RegressionMeter(_Pairs):
    """Root mean squared error, and Pearson's and Spearman's correlation."""

    def update(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        rows: Sequence[Any],  # noqa: ARG002 - as `Meter`
    ) -> None:
        """Add a batch: logits `(batch, 1)`, labels `(batch,)`."""
        self.predicted += logits.float().squeeze(-1).tolist()
        self.true += labels.tolist()

    def compute(self, loss: float) -> dict[str, float]:
        """Return the three; a correlation is left out where one side is constant."""
        from scipy.stats import pearsonr, spearmanr

        scores = {"rmse": math.sqrt(loss)}
        if len(set(self.predicted)) > 1 and len(set(self.true)) > 1:
            scores["pearson"] = float(pearsonr(self.predicted, self.true)[0])
            scores["spearman"] = float(spearmanr(self.predicted, self.true)[0])
        return scores


class TagMeter(_Pairs):
    """Entity precision, recall and F1 where the tags mark entities, else macro F1; accuracy.

    Every word counts: one that has no token is predicted as `O`, or wrongly where there is no `O`.

    Args:
        names: of the tags, by number.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def update(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,  # noqa: ARG002 - the rows have every word's tag
        rows: Sequence[Any],
    ) -> None:
        """Add a batch of `TaggedRow`: logits `(batch, seq, tags)`."""
        best = logits.argmax(-1).tolist()
        for tags, row in zip(best, rows, strict=True):
            self.true.append([self.names[tag] for tag in row.tags])
            self.predicted.append(
                ["O" if at is None else self.names[tags[at]] for at in row.positions]
            )

    def compute(self, loss: float) -> dict[str, float]:  # noqa: ARG002 - as `Meter`
        """Return the scores, and the accuracy over words."""
        from sklearn.metrics import f1_score

        true = [tag for tags in self.true for tag in tags]
        predicted = [tag for tags in self.predicted for tag in tags]
        right = sum(t == p for t, p in zip(true, predicted, strict=True))
        if are_entity_tags(self.names):
            scores = score_entities(self.true, self.predicted)
        else:
            scores = {"f1": float(f1_score(true, predicted, average="macro", zero_division=0))}
        return {**scores, "accuracy": right / len(true)}


class SpanMeter:
    """SQuAD's exact match and F1, between 0 and 1, of the best span over a question's windows.

    Args:
        unanswerable: whether "no answer" may be the prediction.
    """

    def __init__(self, unanswerable: bool) -> None:
        self.unanswerable = unanswerable
        self.found: defaultdict[int, Found] = defaultdict(Found)
        self.answers: dict[int, list[str]] = {}

    def update(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,  # noqa: ARG002 - the windows have their answers
        rows: Sequence[Any],
    ) -> None:
        """Add a batch of `Window`: start and end logits `(batch, seq, 2)`."""
        for scores, window in zip(logits.cpu(), rows, strict=True):
            update_found(self.found[window.row], scores, window)
            self.answers[window.row] = [text for text, _ in window.answers]

    def compute(self, loss: float) -> dict[str, float]:  # noqa: ARG002 - as `Meter`
        """Return exact match and F1, means over the questions."""
        given = {
            row: found.answer(unanswerable=self.unanswerable) for row, found in self.found.items()
        }
        count = len(given)
        return {
            "exact_match": sum(exact_match(t, self.answers[r]) for r, t in given.items()) / count,
            "f1": sum(f1(t, self.answers[r]) for r, t in given.items()) / count,
        }

    def pool(self, meters: Sequence[SpanMeter]) -> SpanMeter:
        """Return a meter of all their questions; one that comes twice counts twice."""
        pooled = SpanMeter(self.unanswerable)
        for meter in meters:
            for row, found in meter.found.items():
                pooled.answers[len(pooled.found)] = meter.answers[row]
                pooled.found[len(pooled.found)] = found
        return pooled
