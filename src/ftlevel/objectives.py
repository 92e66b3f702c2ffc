"""Interfaces of objectives and meters, for the packages that load data, encode and train.

Their implementations and the tasks are in `ftlevel.tasks`. Imports nothing heavy. An objective
returns the loss summed over targets, and their count. The loss of an optimizer step is thus the
mean over the targets of all its micro-batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from ftlevel.config.section import Choice
    from ftlevel.config.sections import DistillationConfig

IGNORED = -100
"""Label of a token without loss."""

Collate = Callable[[Sequence[Any]], dict[str, Any]]
"""Rows → batch on the device of the model."""

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


ChunkLoss = Callable[["Tensor", "Tensor", slice], "Tensor"]
"""(logits (targets, vocabulary), token ids (targets,), slice of all targets) -> summed loss."""

TokenLogps = Callable[[float], "tuple[Tensor, Tensor]"]
"""temperature -> log-probability of each target, float32 (targets,), and the row of each."""

LOSS_INPUTS = ("preference_labels", "known", "ids", "signals")
"""Tensors of a batch that the loss uses and the model does not: see `Encoded.loss_inputs`."""


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
        predicts_tokens: whether targets are tokens of a language head.
        has_own_smoothing: whether the loss smooths labels itself.
        has_classes: whether targets are classes, so that these can be weighted.
        samples: whether training rows are prompts whose completions the model samples; the loss is
            then no metric.
        evaluates_first: whether the model is evaluated before the first step by default.
        needs_whole_step: whether the loss of a step is no sum over its rows.
        shard_limitation: why the model cannot be sharded, as a clause; "" if it can.
        metric_names: default of `metrics`; empty for the headline alone.
    """

    headline: str
    feeds_labels: bool = False
    per_row: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    has_choice: ClassVar[bool] = True
    one_of_many: ClassVar[bool] = False
    predicts_tokens: ClassVar[bool] = False
    has_own_smoothing: ClassVar[bool] = False
    has_classes: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    evaluates_first: ClassVar[bool] = False
    needs_whole_step: ClassVar[bool] = False
    shard_limitation: ClassVar[str] = ""
    metric_names: ClassVar[tuple[str, ...]] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `meter` computes; undefined ones are omitted at run time."""
        return self.metric_names or (self.headline,)

    def split(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Returns the model inputs and the labels of a batch."""
        inputs = dict(batch)
        for name in LOSS_INPUTS:
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

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns flat (batch, seq) indices of positions that predict targets, and target ids.

        None if the targets are not tokens.
        """
        return None

    def get_chunk_loss(self, batch: Mapping[str, Any]) -> ChunkLoss | None:
        """Returns the loss of the batch's targets; None if it is their cross entropy."""
        return None

    def with_teacher(self, config: DistillationConfig) -> Objective:
        """Returns the objective that also learns from the teacher's logits, if it can."""
        return self

    def describe_loss(self) -> list[Choice]:
        """Returns log lines about the training loss."""
        return []

    def likelihood_loss(self, batch: Mapping[str, Any], compute: TokenLogps) -> Tensor | None:
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

    @abstractmethod
    def meter(self) -> Meter:
        """Returns a new meter, whose `update` takes the result of `targets`."""

    @property
    def largest_term(self) -> float:
        """Upper bound of the loss's terms; the rounding error of the loss is proportional to it."""
        return 1.0

    @property
    def first_loss(self) -> float | None:
        """Loss expected at the first step, before anything is learned; None if unknown."""
        return None

    def get_warnings(
        self, metrics: Mapping[str, float], before: Mapping[str, float] | None = None
    ) -> list[str]:
        """Returns warnings about misleading `metrics`; `before` has those before training."""
        return []

    def describe_validation(self, rows: Sequence[Any], options: Mapping[str, Any]) -> list[Choice]:
        """Returns log lines about the loss of validation `rows`; `options` are the model card's."""
        return []

    def compute_whole_step(
        self, model: Any, rows: Sequence[Any], collate: Collate, batch_size: int
    ) -> Tensor | None:
        """Returns the loss of a step by the plain step, if `needs_whole_step`; else None."""
        return None

    def for_comparison(self, rows: Sequence[Any]) -> Objective:
        """Returns the objective by which models are compared on `rows`."""
        return self

    def compare(
        self, model: Any, rows: Sequence[Any], collate: Collate
    ) -> tuple[Tensor, float, int]:
        """Returns the outputs of `model` for `rows`, the loss summed over targets, their count."""
        batch = collate(rows)
        (inputs, labels), mask = self.split(batch), batch["attention_mask"]
        logits = self.logits(model(**inputs))
        loss = self.loss_sum(logits, labels, mask).item()
        return self.choices(logits, labels, mask), loss, int(self.count(labels))

    def guess_loss(self, rows: Sequence[Any]) -> float | None:
        """Returns the loss of always predicting the label frequencies; None if unknown."""
        return None


class TokenObjective(Objective):
    """Base class of objectives of language heads; logits are computed at targets only."""

    one_of_many: ClassVar[bool] = True
    predicts_tokens: ClassVar[bool] = True

    @abstractmethod
    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns flat (batch, seq) indices of positions that predict targets, and target ids."""

    @property
    def of_tokens(self) -> TokenObjective:
        """Objective with the cross entropy of each token; by default, the objective itself."""
        return self

    def for_comparison(self, _: Sequence[Any]) -> Objective:
        """Returns `of_tokens`, which needs no reference model."""
        return self.of_tokens
