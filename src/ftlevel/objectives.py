"""Interfaces of objectives and meters, for the packages that load data, encode and train.

Their implementations and the tasks are in `ftlevel.tasks`. Imports nothing heavy. An objective
returns the loss summed over targets, and their count. The loss of an optimizer step is thus the
mean over the targets of all its micro-batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a token without loss."""

ScoreTexts = Callable[[Sequence[str], Sequence[str], str], dict[str, float]]
"""(predictions, references, ISO 639-1 language or "") -> metrics of generated texts."""


@dataclass(frozen=True)
class Checks:
    """Which checks encoded rows get: token labels, supervised targets, ends, near duplicates."""

    token_labels: bool = False
    supervised: bool = True
    ends: bool = False
    near_duplicates: bool = True


@dataclass(frozen=True)
class TrainingLoss:
    """Options of the training loss: label smoothing, class weights (empty: all 1) and focal γ."""

    smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    focal_gamma: float = 0.0

    @property
    def is_weighted(self) -> bool:
        """Whether targets have different weights."""
        return bool(self.class_weights or self.focal_gamma)

    @property
    def is_plain(self) -> bool:
        """Whether the training loss equals the evaluation loss."""
        return not (self.smoothing or self.is_weighted)


class Meter(Protocol):
    """Metrics accumulated batch by batch, apart from the loss; logits are not stored."""

    def update(self, logits: Tensor, labels: Tensor, rows: Sequence[Any]) -> None:
        """Add a batch of encoded `rows`; logits and labels come from `Objective.targets`."""

    def compute(self, loss: float) -> dict[str, float]:
        """Compute all metrics but the loss; `loss`, the mean over all targets, may be used."""

    def pool(self, meters: Sequence[Any]) -> Meter:
        """Returns a new meter that combines all `meters`."""

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns prediction and target of the only example; `names` are its class or tag names."""


@dataclass(frozen=True)
class Objective(ABC):
    """Loss and metrics from model outputs and the labels of a batch.

    Attributes:
        headline: name of the metric printed first.
        feeds_labels: whether the model builds its decoder inputs from the labels.
        per_row: whether a row has one prediction; logits are `(batch, ...)`.
        per_token: whether every token or word has a class label.
        has_choice: whether targets are categorical, so that KL and top-1 are defined.
        one_of_many: whether a target is one of several classes, so that labels can be smoothed.
        has_classes: whether targets are classes, so that these can be weighted.
        metric_names: default of `metrics`; empty for the headline alone.
    """

    headline: str
    feeds_labels: bool = False
    per_row: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    has_choice: ClassVar[bool] = True
    one_of_many: ClassVar[bool] = False
    has_classes: ClassVar[bool] = False
    metric_names: ClassVar[tuple[str, ...]] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that the meter computes; undefined ones are omitted at run time."""
        return self.metric_names or (self.headline,)

    def split(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Returns the model inputs and the labels of a batch."""
        inputs = dict(batch)
        for name in ("preference_labels", "known", "ids", "signals"):
            inputs.pop(name, None)
        labels = inputs["labels"] if self.feeds_labels else inputs.pop("labels")
        return inputs, labels

    def logits(self, outputs: Any) -> Tensor:
        """Returns the logits of the model outputs in the shape that the other methods expect."""
        scores: Tensor = outputs.logits
        return scores

    def targets(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits and labels of the supervised targets only, without ignored ones."""
        return logits, labels

    def choices(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns the logits of the supervised targets as `(targets, choices)`."""
        return self.targets(logits, labels)[0]

    def count(self, labels: Tensor) -> Tensor:
        """Count the targets (a scalar tensor)."""
        return labels.ne(IGNORED).sum()

    @abstractmethod
    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns the float32 loss summed over targets; `mask` `(batch, seq)` is for attention."""

    def training_sum(
        self, logits: Tensor, labels: Tensor, mask: Tensor, loss: TrainingLoss
    ) -> Tensor:
        """Returns the summed training loss (1 - ε) L + ε Σ mean(-log softmax), as transformers."""
        total, smoothing = self.loss_sum(logits, labels, mask), loss.smoothing
        if not smoothing:
            return total
        scores = self.choices(logits, labels, mask).float()
        uniform = -scores.log_softmax(-1).mean(-1).sum()
        return (1 - smoothing) * total + smoothing * uniform

    def training_count(self, labels: Tensor, loss: TrainingLoss) -> Tensor:
        """Returns the divisor of the summed training loss (a scalar tensor)."""
        return self.count(labels)

    def balance(self, rows: Sequence[Any], classes: int) -> tuple[float, ...]:
        """Returns class weights that balance `rows`; empty for objectives without classes."""
        return ()

    @abstractmethod
    def meter(self) -> Meter:
        """Returns a new meter, whose `update` takes the result of `targets`."""

    @property
    def first_loss(self) -> float | None:
        """Expected loss of the first step; None if unknown."""
        return None

    def get_warnings(
        self, metrics: Mapping[str, float], before: Mapping[str, float] | None = None
    ) -> list[str]:
        """Find warnings about misleading metrics; `before` are the metrics before training."""
        return []

    def guess_loss(self, rows: Sequence[Any]) -> float | None:
        """Returns the loss of always predicting the label frequencies; None if unknown."""
        return None


class TokenObjective(Objective):
    """Objective of a language head, which computes logits at supervised positions only."""

    one_of_many: ClassVar[bool] = True

    @abstractmethod
    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns indices of the flattened positions that predict a target, and these targets."""

    @property
    def of_tokens(self) -> TokenObjective:
        """The objective with one loss per token; here, the objective itself."""
        return self


@dataclass(frozen=True)
class StepTexts:
    """The rows of an optimizer step; texts are indices, because rows may share texts.

    Attributes:
        texts: per row, the indices of its texts: the query, then the documents.
        labels: per row, the labels of its documents or the class of the text.
        teacher: per row, a teacher's score of each document; empty without a teacher.
        guide: float32 vector of each distinct text by a guide model, or None.
    """

    texts: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[float, ...], ...]
    teacher: tuple[tuple[float, ...], ...] = ()
    guide: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: slice) -> StepTexts:
        """Returns the given rows; indices of texts stay the same."""
        return replace(
            self, texts=self.texts[rows], labels=self.labels[rows], teacher=self.teacher[rows]
        )

    @classmethod
    def join(cls, steps: Sequence[StepTexts]) -> StepTexts:
        """Returns the rows of all `steps`, whose text indices must already be disjoint."""
        guides = [vector for step in steps for vector in step.guide or ()]
        return cls(
            tuple(own for step in steps for own in step.texts),
            tuple(own for step in steps for own in step.labels),
            tuple(own for step in steps for own in step.teacher),
            guides or None,
        )

    def after(self, count: int) -> StepTexts:
        """Returns the rows with all text indices increased by `count`."""
        shifted = tuple(tuple(index + count for index in indices) for indices in self.texts)
        return replace(self, texts=shifted)


class StepObjective(Objective):
    """Objective with one vector per text; its loss depends on all rows of an optimizer step."""

    has_choice: ClassVar[bool] = False

    @property
    def largest_term(self) -> float:
        """Largest terms that cancel in the loss; its rounding error is proportional to them."""
        return 1.0

    def logits(self, outputs: Any) -> Tensor:
        """Returns the states of the last layer, `(texts, seq, width)`."""
        states: Tensor = outputs.last_hidden_state
        return states

    @abstractmethod
    def embed(self, outputs: Any, mask: Tensor, unpooled: Sequence[int] = ()) -> Tensor:
        """Returns float32 vectors `(texts, dims)`; `mask` `(texts, seq)` is 1 for a token.

        `unpooled` has the number of first tokens of each text that are not pooled; empty for none.
        """

    @abstractmethod
    def step_loss(self, vectors: Tensor, step: StepTexts) -> Tensor:
        """Returns the mean loss of the rows of a step (a scalar); `vectors` `(texts, dims)`."""

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Raise `TypeError`: a batch has no loss of its own."""
        raise TypeError("the loss needs all rows of a step")

    def meter(self) -> Meter:
        """Raise `TypeError`: a text has no metric of its own."""
        raise TypeError("metrics need the vectors of all texts")


class DistillationObjective(TokenObjective):
    """Token objective with a distillation loss.

    A batch contains the teacher's `known` and `ids`, one entry per target in the order of `locate`.
    Batches without them, as in evaluation, use the token loss only.
    """

    @abstractmethod
    def distillation_sum(
        self, scores: Tensor, targets: Tensor, known: Tensor, ids: Tensor
    ) -> Tensor:
        """Returns the loss summed over targets (a scalar).

        Args:
            scores: `(targets, vocabulary)` logits of the student.
            targets: `(targets,)` token ids.
            known: `(targets, outcomes)` log-probabilities of the teacher, float32.
            ids: `(targets, k)` token ids of `known`.
        """


@dataclass(frozen=True)
class LikelihoodObjective(TokenObjective):
    """Objective computed from log-likelihoods of whole answers, as in preference training.

    A batch contains `preference_labels` `(answers, 3)`; see `Encoded.preference_labels`. The
    answers of a row are consecutive in one batch.

    Attributes:
        needs_reference: whether the loss uses reference log-probabilities.
        needs_baseline: whether rewards are reduced by the mean reward of the contrast answers,
            which must be known before the step.
    """

    needs_reference: bool = False
    needs_baseline: bool = False

    @abstractmethod
    def answers(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        """Returns `(answers, 2)`: log-likelihood and number of tokens of each answer.

        `log_probs` are `(targets,)` in float32, in the order of `locate`; `labels` `(answers,
        seq)`.
        """

    @abstractmethod
    def preference_sum(
        self, answers: Tensor, preference_labels: Tensor, *, training: bool
    ) -> Tensor:
        """Returns the summed loss; in `training`, with one value per divisor of `training_count`.

        `answers` is the result of the method `answers`; `preference_labels` are `(answers, 3)`.
        """


@dataclass(frozen=True)
class PolicyObjective(TokenObjective):
    """Objective of the log-probabilities of sampled tokens, as in reinforcement learning.

    A batch contains `signals` `(targets, n)`; see `Encoded.signals`. They include a weight of each
    target that already normalizes the loss, so `training_count` is 1.

    Attributes:
        temperature: divisor of the logits.
    """

    temperature: float = 1.0

    @abstractmethod
    def policy_sum(self, log_probs: Tensor, owners: Tensor, count: int, signals: Tensor) -> Tensor:
        """Returns the policy loss, a weighted sum over the targets (a scalar).

        `log_probs` are `(targets,)` in float32, in the order of `locate`. `owners` has the index of
        each target's sequence, below `count`. `signals` are those of the batch.
        """
