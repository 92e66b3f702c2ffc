"""Objective and meter of language heads; weighted and focal losses of classes; distillation.

    L = Σᵢ w(yᵢ) (1 − pᵢ)^γ (−log pᵢ) / Σᵢ w(yᵢ),  pᵢ the probability of target i's class yᵢ,

as in `torch.nn.CrossEntropyLoss(weight=…)` and Lin et al. (2017, § 3). Distillation, with
teacher probabilities p and student probabilities q, logits divided by the temperature T:

    L = (1 - w) (-log q(y), of T = 1) + w T² D(p, q)     Hinton et al., 1503.02531, section 2
    forward-kl   Σ p (log p - log q)
    reverse-kl   Σ q (log q - log p)                                      Gu et al., 2306.08543
    jsd          β KL(p, m) + (1 - β) KL(q, m),  m = β p + (1 - β) q  Agarwal et al., 2306.13649

With top-k teacher tokens, the remaining probability is one extra outcome. The divergence of these
k + 1 outcomes is a lower bound of that of the whole vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ftlevel.config.section import Choice
from ftlevel.config.sections import DistillationConfig
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.sources.lines import RowView
from ftlevel.objectives import (
    IGNORED,
    ChunkLoss,
    Meter,
    Objective,
    TokenObjective,
    TrainingLoss,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class ClassObjective(Objective):
    """Base class of objectives with one class per target."""

    one_of_many: ClassVar[bool] = True
    has_classes: ClassVar[bool] = True

    def training_sum(
        self, logits: Tensor, labels: Tensor, mask: Tensor, loss: TrainingLoss
    ) -> Tensor:
        """Returns the cross entropy summed over targets, with the settings `loss` (focal γ, …)."""
        from torch.nn import functional

        if not loss.is_weighted:
            return super().training_sum(logits, labels, mask, loss)
        scores, targets = logits.float().flatten(0, -2), labels.flatten()
        weights = _tensor_of(loss.class_weights, scores)
        if not loss.focal_gamma:
            return functional.cross_entropy(
                scores,
                targets,
                weight=weights,
                ignore_index=IGNORED,
                label_smoothing=loss.smoothing,
                reduction="sum",
            )
        nll = functional.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none")
        focal = focal_factor(nll, loss.focal_gamma) * nll  # 0 where the label is ignored
        return (focal if weights is None else focal * weights[targets.clamp(min=0)]).sum()

    def training_count(self, labels: Tensor, loss: TrainingLoss) -> Tensor:
        """Returns the sum of the class weights of the targets."""
        weights = _tensor_of(loss.class_weights, labels)
        if weights is None:
            return self.count(labels)
        return (weights[labels.clamp(min=0)] * labels.ne(IGNORED)).sum()

    def balance(self, rows: Sequence[Encoded], classes: int) -> tuple[float, ...]:
        """Returns scikit-learn's balanced weights: targets / (classes seen · targets of class)."""
        counts = Counter(_targets_of(rows))
        total, seen = counts.total(), len(counts)
        return tuple(total / (seen * counts[c]) if counts[c] else 1.0 for c in range(classes))


def focal_factor(nll: Tensor, gamma: float) -> Tensor:
    """Returns the focal factor (1 - p)^γ for `nll` = -log p; 1 - p is at least 1e-7."""
    return (-(-nll).expm1()).clamp(min=1e-7) ** gamma


def weighted_binary_cross_entropy(logits: Tensor, labels: Tensor, loss: TrainingLoss) -> Tensor:
    """Returns the binary cross entropy summed over `(rows, classes)`, with the settings `loss`."""
    from torch.nn import functional

    weights = _tensor_of(loss.class_weights, logits)
    if not loss.focal_gamma:
        return functional.binary_cross_entropy_with_logits(
            logits, labels, pos_weight=weights, reduction="sum"
        )
    nll = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    focal = focal_factor(nll, loss.focal_gamma) * nll
    return (focal if weights is None else focal * (1 + (weights - 1) * labels)).sum()


def compute_pos_weight(labels: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Returns each class's ratio of negative to positive rows; 1 if there are none of either."""
    return tuple(
        (len(column) - sum(column)) / sum(column) or 1.0 if any(column) else 1.0
        for column in zip(*labels, strict=True)
    )


def _tensor_of(weights: Sequence[float], like: Tensor) -> Tensor | None:
    import torch

    from ftlevel.models.hardware import send

    return send(torch.tensor(weights, dtype=torch.float32), like.device) if weights else None


def _targets_of(rows: Sequence[Encoded]) -> Iterator[int]:
    for row in rows:
        labels: Any = row.labels
        if isinstance(labels, int):
            yield labels
        else:
            yield from (label for label in labels if label != IGNORED)


P = TypeVar("P", bound="PredictionMeter")


class PredictionMeter:
    """Base class of meters that store the prediction and the target of each row."""

    def __init__(self) -> None:
        self.predicted: list[Any] = []
        self.true: list[Any] = []

    def merge(self: P, other: P) -> None:
        self.predicted += other.predicted
        self.true += other.true

    def pool(self: P, meters: Sequence[P]) -> P:
        pooled = copy.copy(self)
        pooled.predicted, pooled.true = [], []
        for meter in meters:
            pooled.merge(meter)
        return pooled

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns the prediction and the target of the only row; `names` are the class names."""
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
    """Returns the entropy of the frequencies of `answers`, in nats; None if there are none."""
    counts = Counter(answers)
    total = counts.total()
    if not total:
        return None
    return sum(count / total * math.log(total / count) for count in counts.values())


def mean_entropy(columns: Iterable[Iterable[Hashable]]) -> float | None:
    """Returns the mean of `entropy` over `columns` of labels; None if all are empty."""
    values = [value for column in columns if (value := entropy(column)) is not None]
    return sum(values) / len(values) if values else None


def mean_or_nan(values: Sequence[float] | np.ndarray) -> float:
    """Returns the mean of `values`; NaN if there are none."""
    import numpy as np

    return float(np.mean(values)) if len(values) else math.nan


@dataclass(frozen=True)
class Tokens(TokenObjective):
    """Objective: cross entropy of tokens, logits `(batch, seq, vocabulary)`, labels `(batch, seq)`.

    With `shifted`, position i - 1 predicts the label of position i, as in causal models.
    `perplexity` and `accuracy` are metric names.
    """

    shifted: bool = False
    perplexity: str = "perplexity"
    accuracy: str = "token_accuracy"

    def targets(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `(tokens, vocabulary)` logits and `(tokens,)` labels of the supervised tokens."""
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        supervised = labels != IGNORED
        return logits[supervised], labels[supervised]

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        from torch.nn import functional

        if self.shifted:
            labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        flat = labels.flatten()
        at = (flat != IGNORED).nonzero()[:, 0]
        return at, flat[at]

    def count(self, labels: Tensor) -> Tensor:
        return super().count(labels[:, 1:] if self.shifted else labels)

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns the sum of the negative log-likelihoods, in nats."""
        from torch.nn import functional

        scores, targets = self.targets(logits, labels)
        return functional.cross_entropy(scores.float(), targets, reduction="sum")

    def with_teacher(self, config: DistillationConfig) -> DistillationTokens:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return DistillationTokens(**values, config=config)

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.perplexity, self.accuracy

    def meter(self) -> Meter:
        return TokenMeter(self.perplexity, self.accuracy)


class TokenMeter:
    """Meter of supervised tokens; `perplexity` and `accuracy` are the names of its metrics."""

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
        return {
            self.perplexity: math.exp(loss) if loss < 700 else math.inf,
            self.accuracy: self.right / self.tokens if self.tokens else math.nan,
        }

    def merge(self, other: TokenMeter) -> None:
        self.tokens += other.tokens
        self.right += other.right

    def pool(self, meters: Sequence[TokenMeter]) -> TokenMeter:
        pooled = TokenMeter(self.perplexity, self.accuracy)
        for meter in meters:
            pooled.merge(meter)
        return pooled

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns `tokens`, the number of supervised tokens, and `tokens_right`, correct ones."""
        return {"tokens": self.tokens, "tokens_right": self.right}


class TokenTargets(TokenObjective):
    """Base class of sequence objectives; targets and evaluation loss are those of `of_tokens`."""

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_tokens.locate(labels)

    def targets(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_tokens.targets(logits, labels)

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns the summed token cross entropy, for batches without preferences or signals."""
        return self.of_tokens.loss_sum(logits, labels, mask)


MIN_LOG_PROBABILITY = -1e4
"""Lower bound of stored log-probabilities, so that divergences stay finite."""


@dataclass(frozen=True)
class DistillationTokens(Tokens):
    """Objective: token cross entropy and the divergence from a teacher, weighted by `config`.

    A batch has the teacher's float32 log-probabilities `known` `(targets, outcomes)` and ids of its
    top k tokens `ids` `(targets, k)`, in the order of `locate`; the last outcome is all other
    tokens. Without them, as in evaluation, the loss is the token loss.
    """

    config: DistillationConfig = field(default_factory=DistillationConfig)

    def get_chunk_loss(self, batch: Mapping[str, Any]) -> ChunkLoss | None:
        from torch.nn import functional

        config, temperature = self.config, self.config.kd_temperature

        def compute(logits: Tensor, targets: Tensor, chunk: slice) -> Tensor:
            known, ids = batch["known"][chunk], batch["ids"][chunk]
            student = log_outcomes(logits.float() / temperature, ids, known.shape[-1])
            total = temperature**2 * divergence(known, student, config).sum()
            if config.kd_ratio == 1:
                return total
            loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
            return (1 - config.kd_ratio) * loss + config.kd_ratio * total

        return compute if "known" in batch else None

    def describe_loss(self) -> list[Choice]:
        config = self.config
        description = f"{config.kd_ratio:g} {config.divergence} of {config.teacher}"
        if config.kd_ratio < 1:
            description = f"{1 - config.kd_ratio:g} cross entropy + {description}"
        return [Choice("loss", description, f"temperature {config.kd_temperature:g}")]


def log_outcomes(scores: Tensor, ids: Tensor, outcomes: int) -> Tensor:
    """Returns log-probabilities of the tokens `ids`, then of all other tokens as one outcome.

    Args:
        scores: `(targets, vocabulary)` logits divided by the temperature, float32.
        ids: `(targets, k)`; with k = 0, each of the first `outcomes` tokens is an outcome.
        outcomes: k + 1 if k > 0.
    """
    if not ids.shape[-1]:
        return scores[:, :outcomes].log_softmax(-1)
    total = scores.logsumexp(-1, keepdim=True)
    others = scores.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    import torch

    return torch.cat([scores.gather(-1, ids), others], dim=-1) - total


def divergence(teacher: Tensor, student: Tensor, config: DistillationConfig) -> Tensor:
    """Returns each target's divergence of two models' log-probabilities `(targets, outcomes)`."""
    import torch

    if config.divergence == "forward-kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if config.divergence == "reverse-kl":
        return (student.exp() * (student - teacher)).sum(-1)
    beta = config.jsd_beta
    mixed = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher = (teacher.exp() * (teacher - mixed)).sum(-1)
    return beta * of_teacher + (1 - beta) * (student.exp() * (student - mixed)).sum(-1)


def outcome_dtype(config: DistillationConfig, vocabulary: int) -> Any:
    """Returns the dtype of a teacher's values for one target; `vocabulary`: shared tokens.

    `known` has the log-probabilities of the top tokens `ids`, then of all other tokens together;
    without `ids`, those of the whole vocabulary.
    """
    import numpy as np

    count = config.kd_top_k
    if count == "all" or count >= vocabulary - 1:
        return np.dtype([("known", np.float32, (vocabulary,)), ("ids", np.int32, (0,))])
    return np.dtype([("known", np.float32, (count + 1,)), ("ids", np.int32, (count,))])


def select_top_k(scores: Tensor, config: DistillationConfig, dtype: Any) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities and ids as in `outcome_dtype`; `scores` are teacher logits."""
    tempered = scores.float() / config.kd_temperature
    count, outcomes = dtype["ids"].shape[0], dtype["known"].shape[0]
    if not count:  # tokens beyond the shared vocabulary are dropped
        ids = tempered.new_zeros((len(tempered), 0)).long()
    else:
        ids = tempered.topk(count, dim=-1).indices
    return log_outcomes(tempered, ids, outcomes).clamp(min=MIN_LOG_PROBABILITY), ids


@dataclass(frozen=True)
class DistillationRow(Encoded):
    """Row with the teacher's values `taught`: an `outcome_dtype` array with one item per target."""

    taught: Any = field(default=None, compare=False, metadata={"column": "json"})

    @property
    def sequences(self) -> Sequence[Encoded]:
        return [Encoded(self.input_ids, self.labels, self.row, self.extras)]

    @property
    def loss_inputs(self) -> Mapping[str, np.ndarray]:
        """The teacher's log-probabilities `known`, and the tokens `ids` that they are of."""
        return {name: self.taught[name] for name in ("known", "ids")}


class DistillationRows(RowView[Encoded]):
    """Rows with teacher values: those of row i are `values[offsets[i]:offsets[i + 1]]`."""

    def __init__(self, rows: Sequence[Encoded], values: np.ndarray, offsets: Sequence[int]) -> None:
        self.rows, self._values, self._starts = rows, values, offsets

    def _item(self, at: int) -> Encoded:
        row, values = self.rows[at], self._values[self._starts[at] : self._starts[at + 1]]
        return DistillationRow(row.input_ids, row.labels, row.row, row.extras, values)
