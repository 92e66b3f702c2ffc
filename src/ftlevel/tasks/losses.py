"""Objective and meter of language heads; weighted and focal losses of classes.

    L = Σᵢ w(yᵢ) (1 − pᵢ)^γ (−log pᵢ) / Σᵢ w(yᵢ),  pᵢ the probability of target i's class yᵢ,

as in `torch.nn.CrossEntropyLoss(weight=…)` and Lin et al. (2017, section 3).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ftlevel.task import IGNORED, Meter, Objective, TokenObjective, TrainingLoss

if TYPE_CHECKING:
    from torch import Tensor

    from ftlevel.data.encoding.encode import Encoded


class ClassObjective(Objective):
    """Objective with one class per target."""

    one_of_many: ClassVar[bool] = True
    has_classes: ClassVar[bool] = True

    def training_sum(
        self, logits: Tensor, labels: Tensor, mask: Tensor, loss: TrainingLoss
    ) -> Tensor:
        """Return the loss summed over the targets, weighted by class."""
        from torch.nn import functional

        if not loss.is_weighted:
            return super().training_sum(logits, labels, mask, loss)
        scores, targets = self.choices(logits, labels, mask).float(), labels[labels != IGNORED]
        weights = _tensor_of(loss.class_weights, scores)
        if not loss.focal_gamma:
            return functional.cross_entropy(
                scores, targets, weight=weights, label_smoothing=loss.smoothing, reduction="sum"
            )
        surprise = functional.cross_entropy(scores, targets, reduction="none")
        focal = focus(surprise, loss.focal_gamma) * surprise
        return (focal if weights is None else focal * weights[targets]).sum()

    def training_count(self, labels: Tensor, loss: TrainingLoss) -> Tensor:
        """Return the sum of the targets' weights."""
        weights = _tensor_of(loss.class_weights, labels)
        return self.count(labels) if weights is None else weights[labels[labels != IGNORED]].sum()

    def balance(self, rows: Sequence[Encoded], classes: int) -> tuple[float, ...]:
        """Return balanced weights as in scikit-learn: targets / (classes · class targets)."""
        counts = Counter(_targets_of(rows))
        total, seen = counts.total(), len(counts)
        return tuple(total / (seen * counts[c]) if counts[c] else 1.0 for c in range(classes))


def focus(surprise: Tensor, gamma: float) -> Tensor:
    """Return (1 - p)^γ for `surprise` = -log p, clamped because roots have infinite slope at 0."""
    return (-(-surprise).expm1()).clamp(min=1e-7) ** gamma


def weigh_yes_and_no(logits: Tensor, labels: Tensor, loss: TrainingLoss) -> Tensor:
    """Return the summed binary cross entropy of `(rows, classes)`, with positive-term weights."""
    from torch.nn import functional

    weights = _tensor_of(loss.class_weights, logits)
    if not loss.focal_gamma:
        return functional.binary_cross_entropy_with_logits(
            logits, labels, pos_weight=weights, reduction="sum"
        )
    surprise = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    focal = focus(surprise, loss.focal_gamma) * surprise
    return (focal if weights is None else focal * (1 + (weights - 1) * labels)).sum()


def balance_yes_and_no(answers: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Return negative / positive rows per class; 1 for classes that do not occur."""
    columns = list(zip(*answers, strict=True))
    return tuple(
        (len(column) - sum(column)) / sum(column) or 1.0 if any(column) else 1.0
        for column in columns
    )


def _tensor_of(weights: Sequence[float], like: Tensor) -> Tensor | None:
    import torch

    return torch.tensor(weights, dtype=torch.float32, device=like.device) if weights else None


def _targets_of(rows: Sequence[Encoded]) -> Iterator[int]:
    """Yield the class of each target."""
    for row in rows:
        labels: Any = row.labels
        if isinstance(labels, int):
            yield labels
        else:
            yield from (label for label in labels if label != IGNORED)


P = TypeVar("P", bound="PredictionMeter")


class PredictionMeter:
    """Meter that stores predictions and targets row by row."""

    def __init__(self) -> None:
        self.predicted: list[Any] = []
        self.true: list[Any] = []

    def pool(self: P, meters: Sequence[P]) -> P:
        """Return a meter of the rows of all `meters`."""
        pooled = copy.copy(self)
        pooled.predicted = [value for meter in meters for value in meter.predicted]
        pooled.true = [value for meter in meters for value in meter.true]
        return pooled

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Return prediction and target of the only example seen, with names from `names`."""
        return {
            "predicted": _name_values(self.predicted[0], names),
            "true": _name_values(self.true[0], names),
        }


def _name_values(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, int) and names:
        return names[value]
    if isinstance(value, list) and value and isinstance(value[0], int):
        return [name for name, is_set in zip(names, value, strict=True) if is_set]
    return value


def entropy(answers: Iterable[Hashable]) -> float | None:
    """Return the entropy of the answer frequencies in nats, a bound for constant predictions."""
    counts = Counter(answers)
    total = counts.total()
    if not total:
        return None
    return sum(count / total * math.log(total / count) for count in counts.values())


def mean_entropy(columns: Iterable[Iterable[Hashable]]) -> float | None:
    """Return the mean entropy of the columns; None if all are empty."""
    values = [value for column in columns if (value := entropy(column)) is not None]
    return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Tokens(TokenObjective):
    """Cross entropy over tokens: logits `(batch, seq, vocabulary)`, labels `(batch, seq)`.

    With `shifted`, position i - 1 predicts the label of position i, as in causal models.
    `perplexity` and `accuracy` are metric names.
    """

    shifted: bool = False
    perplexity: str = "perplexity"
    accuracy: str = "token_accuracy"

    def targets(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(tokens, vocabulary)` logits and `(tokens,)` labels of the supervised tokens."""
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        supervised = labels != IGNORED
        return logits[supervised], labels[supervised]

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return where targets are predicted in the flattened `(batch, seq)`, and the targets."""
        from torch.nn import functional

        if self.shifted:
            labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        flat = labels.flatten()
        at = (flat != IGNORED).nonzero()[:, 0]
        return at, flat[at]

    def count(self, labels: Tensor) -> Tensor:
        """Count the supervised tokens."""
        return super().count(labels[:, 1:] if self.shifted else labels)

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
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

    def update(self, logits: Tensor, labels: Tensor, rows: Sequence[Any]) -> None:
        """Add a batch's supervised tokens: logits `(tokens, vocabulary)`, labels `(tokens,)`."""
        self.right += int((logits.argmax(-1) == labels).sum())
        self.tokens += labels.numel()

    def compute(self, loss: float) -> dict[str, float]:
        """Compute perplexity and accuracy."""
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
