"""What the rooms below ask of a task: how its rows are made, and what a model is trained on.

A task is one file of `ftlevel.tasks`, above the rooms that read, encode and compute. They are given
one as an argument, and this is all that they know of it. Nothing heavy is imported here.

A loss is a sum over targets and goes with their number, so that the loss of an optimizer step is
the mean over the targets of all its micro-batches, however they were cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ftlevel.config.section import Choice

if TYPE_CHECKING:
    import torch

    from ftlevel.config import DataConfig
    from ftlevel.data.encoding.encode import Encoded, PromptFormat
    from ftlevel.data.encoding.fit import Fitted
    from ftlevel.data.formats.detect import Format
    from ftlevel.data.formats.labels import LabelSet
    from ftlevel.data.gate.flat import Mask
    from ftlevel.data.prepare.encoder import Encoder, EncodingContext, Prepared
    from ftlevel.data.prepare.loading import Loaded
    from ftlevel.data.sources.table import BadRow, Row, Table

IGNORED = -100
"""The label of a token that is not learned."""

ScoreTexts = Callable[[Sequence[str], Sequence[str], str], dict[str, float]]
"""Scores generated texts against references in a language ("" if unknown)."""


@dataclass(frozen=True)
class Checks:
    """Which checks of the gate the encoded rows of a task go through.

    Attributes:
        token_labels: labels are token ids, and so within the vocabulary.
        supervised: each row has something to learn.
        ends: each answer ends in a token at which generation stops.
        near_duplicates: rows that share most of their tokens are one too many.
    """

    token_labels: bool = False
    supervised: bool = True
    ends: bool = False
    near_duplicates: bool = True


@dataclass(frozen=True)
class TrainingLoss:
    """What the loss of training has beside that of evaluation.

    Attributes:
        smoothing: share of a target's probability that is spread over all choices.
        class_weights: of each class, by number; where a row has several, of its yes. Empty: all 1.
        focal_gamma: how much less a target weighs the likelier it is already; 0 for not at all.
    """

    smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    focal_gamma: float = 0.0

    @property
    def weighs(self) -> bool:
        """Whether some targets count for more than others."""
        return bool(self.class_weights or self.focal_gamma)

    @property
    def is_plain(self) -> bool:
        """Whether it is that of evaluation."""
        return not (self.smoothing or self.weighs)


class Task(ABC):
    """How rows become what a model learns; what most tasks answer is answered here.

    Attributes:
        name: as in `--task`.
        instruction: what a decoder or T5 is told before the source text; empty for none.
        answer_cue: what ends the prompt of a model without a chat template.
        builtin_subset: which part of `builtin:docstrings` is read; empty for all.
        needs_offsets: whether encoding asks which characters a token covers.
        checks: which checks of the gate its rows go through.
        split_words: what it is called that an example became several rows.
    """

    name: str
    instruction: str
    answer_cue: str
    builtin_subset: str
    needs_offsets: ClassVar[bool] = False
    checks: ClassVar[Checks] = Checks()
    split_words: ClassVar[str] = "split into several"

    @property
    def decides(self) -> Mapping[str, Any]:
        """What of the configuration decides the rows, beside the data section."""
        return {}

    @abstractmethod
    def find_format(
        self, columns: Sequence[str], config: DataConfig, rows: Sequence[Row] = ()
    ) -> Format:
        """Return what `columns` are used for; `rows` are some of the table.

        Raises:
            InputError: no format of the task fits.
        """

    def read_columns(
        self, format_: Format, table: Table, config: DataConfig
    ) -> tuple[Format, list[Choice]]:
        """Return the format with what the task reads off the columns, and the lines about it."""
        return format_, []

    def label_role(self, format_: Format) -> str | None:
        """Return the role whose values are classes, to be numbered; None where there are none."""
        return None

    def find_faults(self, examples: Sequence[Any], labels: LabelSet, table: Table) -> list[BadRow]:
        """Return the rows whose classes do not go together."""
        return []

    def prompt_format(self, format_: Format, kind: str, tokenizer: Any) -> PromptFormat | None:
        """Return how prompts are laid out for a model of `kind`; None where there are none."""
        return None

    @abstractmethod
    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> Fitted:
        """Return the encoded rows of `examples`, of a length that fits.

        Raises:
            InputError: one cannot be encoded or made to fit.
        """

    def look(self, rows: Sequence[Encoded]) -> Mapping[str, Mask]:
        """Return check of the gate → the rows with a finding, beside those that `checks` names."""
        return {}

    def judge_examples(self, examples: Sequence[Any]) -> Sequence[tuple[str, int, str]]:
        """Return (check of the gate, examples with it, what it is) for training examples."""
        return ()

    def facts(self, loaded: Loaded) -> Mapping[str, Any]:
        """Return what summary.json says of the data, beside what is known of any."""
        return {}

    def describe_rows(self, loaded: Loaded, facts: Mapping[str, Any]) -> list[Choice]:
        """Return the lines for the screen that say how much there is to learn."""
        tokens, supervised = facts["tokens"], facts["supervised"]
        share = f"{supervised:,} supervised, {supervised / tokens:.0%}"
        return [Choice("tokens", f"{tokens:,} an epoch", share)]

    def finish(self, prepared: Prepared, config: DataConfig, context: EncodingContext) -> Prepared:
        """Return `prepared` as it is trained on: where labels are drawn anew, with the draws."""
        return prepared

    def fix(
        self, rows: Sequence[Encoded], config: DataConfig, context: EncodingContext
    ) -> Sequence[Encoded]:
        """Return rows to score, which are the same whenever they are taken."""
        return rows


class Meter(Protocol):
    """Metrics that are summed up batch by batch, so that no logits outlive their batch.

    The mean loss is computed beside it.
    """

    def update(self, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Any]) -> None:
        """Add a batch of encoded `rows`, by what `Objective.targets` returned."""

    def compute(self, loss: float) -> dict[str, float]:
        """Return the metrics but the loss; `loss` is the mean over all targets."""

    def pool(self, meters: Sequence[Any]) -> Meter:
        """Return a new meter of this kind that has seen what each of `meters` has seen."""

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what was predicted for the only example seen and what is true, in words.

        Args:
            names: of the classes or tags.
        """


@dataclass(frozen=True)
class Objective(ABC):
    """How the outputs of a model and the labels of a batch become a loss and metrics.

    Attributes:
        headline: the metric that is shown first.
        feeds_labels: whether the model needs the labels to build its decoder's inputs.
        per_row: whether scores are of whole rows, made of one token of each: `(batch, …)`.
        per_token: whether every token or word is a target with a class of its own.
        has_choice: whether there is something to choose between, so that KL and top-1 have sense.
        one_of_many: whether a target is one choice of several, so that labels can be smoothed.
        has_classes: whether a target is of a class, so that classes can have weights.
    """

    headline: str
    feeds_labels: bool = False
    per_row: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    has_choice: ClassVar[bool] = True
    one_of_many: ClassVar[bool] = False
    has_classes: ClassVar[bool] = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """What its meter computes, by name; one may be missing where it is not defined."""
        return (self.headline,)

    def split(self, batch: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
        """Return what the model is called with, and the labels."""
        inputs = dict(batch)
        for name in ("verdicts", "known", "ids"):
            inputs.pop(name, None)
        labels = inputs["labels"] if self.feeds_labels else inputs.pop("labels")
        return inputs, labels

    def logits(self, outputs: Any) -> torch.Tensor:
        """Return the scores of a model's outputs, in the shape that the other methods take."""
        scores: torch.Tensor = outputs.logits
        return scores

    def targets(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and labels of the supervised targets only."""
        return logits, labels

    def choices(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits of the supervised targets as `(targets, choices)`."""
        return self.targets(logits, labels)[0]

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

    def training_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, loss: TrainingLoss
    ) -> torch.Tensor:
        """Return the loss of training, summed: (1 − ε) L + ε Σ mean(−log softmax) with smoothing ε.

        That is transformers' `LabelSmoother`. Arguments are those of `loss_sum`, and what training
        has beside it.
        """
        total, smoothing = self.loss_sum(logits, labels, mask), loss.smoothing
        if not smoothing:
            return total
        scores = self.choices(logits, labels, mask).float()
        uniform = -scores.log_softmax(-1).mean(-1).sum()
        return (1 - smoothing) * total + smoothing * uniform

    def training_count(self, labels: torch.Tensor, loss: TrainingLoss) -> torch.Tensor:
        """Return what the sum of the loss of training is divided by (a scalar)."""
        return self.count(labels)

    def balance(self, rows: Sequence[Encoded], classes: int) -> tuple[float, ...]:
        """Return the weights with which `classes` of `rows` count alike, where there are some."""
        return ()

    @abstractmethod
    def meter(self) -> Meter:
        """Return a new meter; it is updated with what `targets` returns."""

    @property
    def first_loss(self) -> float | None:
        """What the loss of the first step has to be, where that is known."""
        return None

    def remarks(
        self, metrics: Mapping[str, float], before: Mapping[str, float] | None = None
    ) -> list[str]:
        """Return warnings about metrics that look better than they are.

        Args:
            metrics: of the trained model.
            before: of the model before step 1, if it was evaluated.
        """
        return []

    def guess_loss(self, rows: Sequence[Encoded]) -> float | None:
        """Return the mean loss of guessing without reading, by how often `rows` have each answer.

        None where that says nothing, as of text, whose model guesses better before it is trained.
        """
        return None


class TokenObjective(Objective):
    """What predicts tokens by a language head, and so needs it at some positions only."""

    one_of_many: ClassVar[bool] = True

    @abstractmethod
    def locate(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where targets are predicted in the flattened (batch, seq), and the targets."""

    @property
    def of_tokens(self) -> TokenObjective:
        """What it is where each token has a loss of its own."""
        return self


class TaughtObjective(TokenObjective):
    """What learns tokens from a teacher too.

    A batch has `known` and `ids`, what the teacher expects at each target in the order of `locate`.
    One that has not, as in evaluation, is scored without a teacher.
    """

    @abstractmethod
    def taught_sum(
        self,
        scores: torch.Tensor,
        targets: torch.Tensor,
        known: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss summed over targets (a scalar).

        Args:
            scores: (targets, vocabulary) of the model.
            targets: (targets,) token ids.
            known: (targets, outcomes) log-probabilities by the teacher, float32.
            ids: (targets, k) the tokens that these are of.
        """


@dataclass(frozen=True)
class LikelihoodObjective(TokenObjective):
    """What depends on how likely whole answers are, and not on each of their tokens by itself.

    A batch has `verdicts` (answers, 3), as of `Encoded.verdicts`. A row may have several answers,
    which stand side by side in one batch.

    Attributes:
        needs_reference: whether it compares with the model as it began.
        needs_baseline: whether the mean reward of the rows' contrasts is taken off the rewards,
            which has to be known before the step.
    """

    needs_reference: bool = False
    needs_baseline: bool = False

    @abstractmethod
    def answers(self, each: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return (answers, 2): the log-likelihood of each answer, and its number of tokens.

        Args:
            each: (targets,) log-likelihoods in the order of `locate`, float32.
            labels: (answers, seq).
        """

    @abstractmethod
    def judge(
        self, answers: torch.Tensor, verdicts: torch.Tensor, *, training: bool
    ) -> torch.Tensor:
        """Return the loss summed over what it is the mean of (a scalar, or several terms).

        Args:
            answers: as `answers` gave them.
            verdicts: (answers, 3).
            training: as `training_count` counts; otherwise as `count` does, a scalar.
        """
