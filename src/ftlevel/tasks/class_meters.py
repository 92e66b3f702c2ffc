"""How classes, several of them, and quantities are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ftlevel.tasks.pairs import Pairs

if TYPE_CHECKING:
    import torch


class ClassMeter(Pairs):
    """Accuracy, macro F1 and Matthews' correlation of single-label classification."""

    def update(self, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Any]) -> None:
        """Add a batch: logits `(batch, classes)`, labels `(batch,)`."""
        self.predicted += logits.argmax(-1).tolist()
        self.true += labels.tolist()

    def compute(self, loss: float) -> dict[str, float]:
        """Return accuracy, F1 (its mean over the classes that occur) and MCC (-1 to 1)."""
        true, predicted = (np.asarray(side, np.int64) for side in (self.true, self.predicted))
        count, size = len(true), int(max(true.max(), predicted.max())) + 1
        of_true, of_predicted = (np.bincount(side, minlength=size) for side in (true, predicted))
        hits = np.bincount(true[true == predicted], minlength=size)
        there = of_true + of_predicted > 0
        right, own = int(hits.sum()), count**2 - int(of_true @ of_true)
        both = own * (count**2 - int(of_predicted @ of_predicted))
        agreed = right * count - int(of_true @ of_predicted)
        return {
            "accuracy": right / count,
            "f1": float(np.mean(2 * hits[there] / (of_true + of_predicted)[there])),
            "mcc": agreed / math.sqrt(both) if both else 0.0,
        }


class MultiLabelMeter(Pairs):
    """F1 and subset accuracy of labels that are told apart at a probability of one half."""

    def update(self, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Any]) -> None:
        """Add a batch: logits and labels (0.0 or 1.0) `(batch, classes)`."""
        self.predicted += (logits > 0).int().tolist()
        self.true += labels.int().tolist()

    def compute(self, loss: float) -> dict[str, float]:
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


class RegressionMeter(Pairs):
    """Root mean squared error, and Pearson's and Spearman's correlation."""

    def update(self, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Any]) -> None:
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
