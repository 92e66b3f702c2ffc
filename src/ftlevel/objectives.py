"""Interfaces of objectives and meters, for the packages that load data, encode and train.

Their implementations and the tasks are in `ftlevel.tasks`. Imports nothing heavy. An objective
returns the loss summed over targets, and their count. The loss of an optimizer step is thus the
mean over the targets of all its micro-batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from ftlevel.config.section import Choice

IGNORED = -100
"""Label of a token without loss."""

ScoreTexts = Callable[[Sequence[str], Sequence[str], str], dict[str, float]]
"""(predictions, references, ISO 639-1 language or "") -> metrics of generated texts."""


@dataclass(frozen=True)
class Checks:
    """Optional data checks of encoded rows, each on or off for a task.

    `token_labels`: labels are in the vocabulary; `supervised`: a row has a label; `ends`: checks of
    generated answers, such as a missing EOS token; `near_duplicates`: rows differ substantially.
    """

    token_labels: bool = False
    supervised: bool = True
    ends: bool = False
    near_duplicates: bool = True


@dataclass(frozen=True)
class TrainingLoss:
    """Options of the training loss: label smoothing, class weights (empty: all 1), focal gamma."""

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
    """Interface of meters, which accumulate metrics besides the loss batch by batch."""

    def update(self, logits: Tensor, labels: Tensor, rows: Sequence[Any]) -> None:
        """Add a batch: the encoded `rows`, and the logits and labels from `Objective.targets`."""

    def compute(self, loss: float) -> dict[str, float]:
        """Returns all metrics except the loss; `loss` is the mean loss over all targets."""

    def merge(self, other: Any) -> None:
        """Add the batches of the meter `other`, as if they had been added to this one."""

    def pool(self, meters: Sequence[Any]) -> Meter:
        """Returns a new meter of the examples of all `meters`; equal ones count repeatedly."""

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns prediction and label of the only row added; `names` are class or tag names."""


@runtime_checkable
class SortedMeter(Meter, Protocol):
    """Interface of meters with a fast bootstrap, which sorts the targets once for all draws."""

    def resampler(self, meters: Sequence[Any]) -> Callable[[Any], dict[str, float]] | None:
        """Returns a function from the draws of each meter, `(meters,)`, to the metrics; or None."""


@dataclass(frozen=True)
class Likelihoods:
    """Functions that compute log-likelihoods of a batch.

    `per_answer` returns `(answers, 2)`, as `LikelihoodObjective.answers`; `per_token(temperature)`
    the log-probabilities of the targets and the row of each.
    """

    per_answer: Callable[[], Tensor]
    per_token: Callable[[float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective(ABC):
    """Base class of objectives: loss and metrics from model outputs and the labels of a batch.

    Attributes:
        headline: name of the metric printed first.
        feeds_labels: whether the model builds its decoder inputs from the labels.
        per_row: whether a row has one prediction; logits are `(batch, ...)`.
        per_token: whether every token or word has a class label.
        has_choice: whether targets are categorical, so that KL and top-1 are defined.
        one_of_many: whether a target is one of several classes, so that labels can be smoothed.
        has_classes: whether targets are classes, so that these can be weighted.
        has_language_head: whether logits are those of a language head.
        samples: whether training rows are prompts whose completions the model samples; the loss is
            then no metric.
        evaluates_first: whether the model is evaluated before the first step by default.
        shard_limitation: why the model cannot be sharded, as a clause; "" if it can.
        metric_names: default of `metrics`; empty for the headline alone.
    """

    headline: str
    feeds_labels: bool = False
    per_row: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    has_choice: ClassVar[bool] = True
    one_of_many: ClassVar[bool] = False
    has_classes: ClassVar[bool] = False
    has_language_head: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    evaluates_first: ClassVar[bool] = False
    shard_limitation: ClassVar[str] = ""
    metric_names: ClassVar[tuple[str, ...]] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `meter` computes; undefined ones are omitted at run time."""
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
        """Returns the logits of the supervised targets, `(targets, classes or vocabulary)`."""
        return self.targets(logits, labels)[0]

    def count(self, labels: Tensor) -> Tensor:
        """Returns the number of targets in `labels` that are not ignored (a scalar tensor)."""
        return labels.ne(IGNORED).sum()

    @abstractmethod
    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns the float32 loss summed over targets; `mask` is the attention mask."""

    def training_sum(
        self, logits: Tensor, labels: Tensor, mask: Tensor, loss: TrainingLoss
    ) -> Tensor:
        """Returns the loss summed over targets, with the label smoothing of the options `loss`."""
        total, smoothing = self.loss_sum(logits, labels, mask), loss.smoothing
        if not smoothing:
            return total
        uniform = -self.choices(logits, labels, mask).float().log_softmax(-1).mean(-1).sum()
        return (1 - smoothing) * total + smoothing * uniform

    def training_count(self, labels: Tensor, loss: TrainingLoss) -> Tensor:
        """Returns the tensor that `training_sum` is divided by; by default, the target count."""
        return self.count(labels)

    def step_count(self, counts: Sequence[Tensor]) -> Tensor:
        """Returns the count of a step whose micro-batches have `counts` of `training_count`."""
        total: Tensor = sum(counts[1:], counts[0])
        return total

    def likelihood_loss(self, batch: Mapping[str, Any], compute: Likelihoods) -> Tensor | None:
        """Returns the summed loss of a batch from log-likelihoods; None for a loss of logits."""
        return None

    def micro_batch_tokens(self, meta: Any, rows: Sequence[Any], device: str, workers: int) -> int:
        """Returns the minimum tokens of a micro-batch that shares prefixes; `meta` has no weights.

        `workers` is the number of parallel workers.
        """
        return 0

    def balance(self, rows: Sequence[Any], classes: int) -> tuple[float, ...]:
        """Returns class weights inverse to class frequency in `rows`; empty without classes."""
        return ()

    def with_distillation(self, config: Any) -> Objective:
        """Returns the objective with the loss of `config`, `DistillationConfig`, if it has one."""
        return self

    @property
    def loss_choices(self) -> list[Choice]:
        """Log lines about the training loss."""
        return []

    @abstractmethod
    def meter(self) -> Meter:
        """Returns a new meter, whose `update` takes the result of `targets`."""

    @property
    def first_loss(self) -> float | None:
        """Loss expected at the first step, before anything is learned; None if unknown."""
        return None

    def get_warnings(
        self, metrics: Mapping[str, float], before: Mapping[str, float] | None = None
    ) -> list[str]:
        """Returns warnings about misleading `metrics`; `before` has those before training."""
        return []

    def get_validation_group(self, rows: Sequence[Any]) -> tuple[str, int] | None:
        """Returns the loss of `rows` and how many rows it compares; None if it compares none."""
        return None

    def guess_loss(self, rows: Sequence[Any]) -> float | None:
        """Returns the loss of always predicting the label frequencies; None if unknown."""
        return None


class TokenObjective(Objective):
    """Base class of objectives of language heads; logits are computed at targets only."""

    one_of_many: ClassVar[bool] = True
    has_language_head: ClassVar[bool] = True

    @abstractmethod
    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns flat (batch, seq) indices of positions that predict targets, and target ids."""

    @property
    def of_tokens(self) -> TokenObjective:
        """Objective with the cross entropy of each token; by default, the objective itself."""
        return self


@dataclass(frozen=True)
class StepTexts:
    """Indices of the texts of each row of an optimizer step; rows may share texts.

    Attributes:
        texts: per row, the indices of its texts: the query, then the documents.
        labels: per row, the labels of its documents or the class of the text.
        teacher: per row, a teacher's score of each document; empty without a teacher.
        guide: a guide model's float32 embedding of each distinct text, or None.
        keys: a key of each distinct text, by which `join` finds texts of several steps.
    """

    texts: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[float, ...], ...]
    teacher: tuple[tuple[float, ...], ...] = ()
    guide: Sequence[Any] | None = None
    keys: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: slice) -> StepTexts:
        """Returns only the rows at the indices `rows`; text indices stay the same."""
        return replace(
            self, texts=self.texts[rows], labels=self.labels[rows], teacher=self.teacher[rows]
        )

    @classmethod
    def join(cls, steps: Sequence[StepTexts]) -> StepTexts:
        """Returns the rows of all `steps`; their texts, in this order, have consecutive indices.

        A text that occurs several times has the index of its first occurrence.
        """
        guides = [vector for step in steps for vector in step.guide or ()]
        first: dict[Any, int] = {}
        texts: list[tuple[int, ...]] = []
        count = 0
        for step in steps:
            own = [first.setdefault(key, at) for at, key in enumerate(step.keys, count)]
            texts += [tuple(own[index] for index in indices) for indices in step.texts]
            count += len(own)
        return cls(
            tuple(texts),
            tuple(own for step in steps for own in step.labels),
            tuple(own for step in steps for own in step.teacher),
            guides or None,
        )


class StepObjective(Objective):
    """Base class of objectives with a loss of the embeddings of all texts of an optimizer step."""

    has_choice: ClassVar[bool] = False
    evaluates_first: ClassVar[bool] = True
    shard_limitation: ClassVar[str] = "it was never tried on a sharded model"

    @property
    def largest_term(self) -> float:
        """Upper bound of the loss's terms; the rounding error of the loss is proportional to it."""
        return 1.0

    def logits(self, outputs: Any) -> Tensor:
        """Returns the hidden states of the last layer, `(texts, seq, width)`."""
        states: Tensor = outputs.last_hidden_state
        return states

    @abstractmethod
    def embed(self, outputs: Any, mask: Tensor, unpooled: Sequence[int] = ()) -> Tensor:
        """Returns float32 embeddings `(texts, dims)`; `mask` is the attention mask `(texts, seq)`.

        Pooling skips the first `unpooled[i]` tokens of text i; an empty `unpooled` skips none.
        """

    @abstractmethod
    def step_loss(self, vectors: Tensor, step: StepTexts) -> Tensor:
        """Returns the mean loss of a step's rows (a scalar) from embeddings `(texts, dims)`."""

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Raise `TypeError`: the loss needs all rows of a step, not one batch."""
        raise TypeError("the loss needs all rows of a step")

    def meter(self) -> Meter:
        """Raise `TypeError`: metrics need the embeddings of all texts."""
        raise TypeError("metrics need the vectors of all texts")


class DistillationObjective(TokenObjective):
    """Base class of token objectives with a distillation loss.

    A batch has the teacher's log-probabilities `known` and token `ids` per target, in the order of
    `locate`. Without them, as in evaluation, the loss is the token loss.
    """

    @abstractmethod
    def distillation_sum(
        self, scores: Tensor, targets: Tensor, known: Tensor, ids: Tensor
    ) -> Tensor:
        """Returns the loss summed over targets (a scalar).

        Args:
            scores: `(targets, vocabulary)` logits of the student.
            targets: `(targets,)` token ids.
            known: `(targets, outcomes)` float32 log-probabilities by the teacher.
            ids: `(targets, k)` ids of the teacher's top k tokens; the last outcome is all others.
        """


@dataclass(frozen=True)
class LikelihoodObjective(TokenObjective):
    """Base class of objectives of whole answers' log-likelihoods, as in preference training.

    A batch contains `preference_labels` `(answers, 3)`: 1.0 if preferred or desirable, reference
    log-probability, margin. The answers of a row are consecutive in one batch.

    Attributes:
        needs_baseline: whether the loss subtracts, from rewards, the mean reward of mismatched
            prompt-answer pairs (KTO), which must be known before the step.
    """

    needs_reference: bool = False
    needs_baseline: bool = False
    shard_limitation: ClassVar[str] = "the reference cache is per process"

    def likelihood_loss(self, batch: Mapping[str, Any], compute: Likelihoods) -> Tensor | None:
        """Returns `preference_sum` of the answers in a batch."""
        return self.preference_sum(compute.per_answer(), batch["preference_labels"], training=True)

    @abstractmethod
    def answers(self, log_probs: Tensor, owners: Tensor, count: int) -> Tensor:
        """Returns `(count, 2)`: log-likelihood and number of tokens of each answer.

        `log_probs` are float32 `(targets,)`; `owners` `(targets,)` is the answer of each.
        """

    @abstractmethod
    def preference_sum(
        self, answers: Tensor, preference_labels: Tensor, *, training: bool
    ) -> Tensor:
        """Returns the loss sum; in `training`, one sum per count that `training_count` returns.

        `answers` `(answers, 2)` is what `self.answers` returns; labels are those of `Encoded`.
        """


@dataclass(frozen=True)
class PolicyObjective(TokenObjective):
    """Base class of objectives of sampled tokens' log-probabilities, as in reinforcement learning.

    A batch contains `signals` `(targets, n)`. They include a weight per target that already
    normalizes the loss, so `training_count` is 1. `temperature` divides logits.
    """

    temperature: float = 1.0
    samples: ClassVar[bool] = True
    evaluates_first: ClassVar[bool] = True
    shard_limitation: ClassVar[str] = (
        "each process samples its own completions with all weights, and would hold a part of them"
    )

    def step_count(self, counts: Sequence[Tensor]) -> Tensor:
        """Returns the first count: the weights are those of the whole step already."""
        return counts[0]

    def likelihood_loss(self, batch: Mapping[str, Any], compute: Likelihoods) -> Tensor | None:
        """Returns `policy_sum` of the sampled tokens in a batch; None without `signals`."""
        if "signals" not in batch:
            return None
        likelihoods, owners = compute.per_token(self.temperature)
        return self.policy_sum(likelihoods, owners, batch["signals"])

    @abstractmethod
    def policy_sum(self, log_probs: Tensor, owners: Tensor, signals: Tensor) -> Tensor:
        """Returns the policy loss, a weighted sum over the targets (a scalar).

        `log_probs` are float32 `(targets,)`, in the order of `locate`; `owners` `(targets,)` are
        the batch indices of the targets' sequences; `signals` are `(targets, n)`.
        """
