"""Reward models, trained on answer pairs with the Bradley-Terry loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftlevel.config.preference import PreferenceConfig
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.formats.detect import Format, FormatSpec
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.task import Checks, Meter, Objective
from ftlevel.tasks.base import Column, OutputOptions, Prediction, PromptedModel, check_options
from ftlevel.tasks.preferences.formats import JUDGED_SHAPES, PAIR_SHAPES, build_scored
from ftlevel.tasks.preferences.objective import bradley_terry
from ftlevel.tasks.preferences.policy import AnswerTask
from ftlevel.tasks.preferences.rows import PreferenceEncoder

if TYPE_CHECKING:
    from torch import Tensor

    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.prepare.encoder import Encoder
    from ftlevel.data.prepare.loading import LoadedExamples
    from ftlevel.models.sources import ModelSource

BINS = 10
"""Number of bins of the calibration error."""


@dataclass(frozen=True)
class RewardTask(AnswerTask):
    """Task of a model with one scalar score per answer."""

    has_new_head: ClassVar[bool] = True
    finds_ends_by_padding: ClassVar[bool] = True
    scored: ClassVar[bool] = True
    synthetic_facts: ClassVar[Mapping[str, Any]] = {"problem_type": "regression"}
    head_like: ClassVar[str] = "text-classification"
    separates_padding: ClassVar[bool] = True
    checks: ClassVar[Checks] = Checks(ends=True)

    def build_objective(self, kind: str, facts: Mapping[str, Any]) -> Objective:
        """Build the logistic loss of the score difference of a pair."""
        return RewardObjective("accuracy", settings=self._settings(facts))

    def _settings(self, facts: Mapping[str, Any]) -> PreferenceConfig:
        return self.configured(facts).settings if "preference" in facts else self.settings

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        """Encode prompts with two answers."""
        return self.encode_as(encoder, examples, table, scored=True)

    def facts(self, loaded: LoadedExamples) -> Mapping[str, Any]:
        """Returns the loss, and `regression` as problem type."""
        return {**super().facts(loaded), "problem_type": "regression"}

    def card_options(self, config: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the loss, and `regression` as problem type."""
        return {**super().card_options(config, facts), "problem_type": "regression"}

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        """Returns regression options; raises `InputError` if the model has more than one label."""
        if model_config.num_labels != 1:
            raise InputError(
                f"a reward model has one score, and this one has {model_config.num_labels} "
                "classes. Choose another, or --task text-classification."
            )
        prompt_format = self.prompt_format(Format(self.name, "", build_scored, {}), kind, tokenizer)
        return {
            "prompt": prompt_format.to_dict() if prompt_format else {},
            "options": {"problem_type": "regression", "preference": {"loss": "reward"}},
        }

    def build_query(self, prompt: str, context: str | None, number: int) -> Any:
        """Raise `InputError`: a prompt without an answer has no score."""
        raise InputError(
            "a reward model scores answers to prompts. Use ftlevel predict with columns prompt "
            "and completion."
        )

    def answer_columns(
        self,
        format_: Format,
        labels: Sequence[str],
        options: Mapping[str, Any],
        outputs: OutputOptions,
    ) -> dict[str, Column]:
        """Returns one score column."""
        check_options(outputs, "a reward model", "")
        return {"": "number"}

    def answer_rows(
        self, model: PromptedModel, questions: Sequence[Any], outputs: OutputOptions
    ) -> list[Prediction]:
        """Returns the score of each answer."""
        if model.prompt_format is None:
            raise TypeError("answers have a prompt format")
        encode = PreferenceEncoder(
            model.tokenizer, model.prompt_format, model.kind, True, True, False
        )
        rows = [
            Encoded(row.input_ids, 0, index)
            for index, question in enumerate(questions)
            for row in encode.answers([question])
        ]

        def read(_: Encoded, logits: Tensor) -> Prediction:
            score = float(logits.float().reshape(-1)[0])
            return Prediction(f"{score:.4g}", {"score": score}, columns={"": score})

        return model.score(rows, read)

    def probe_labels(self, ids: Sequence[int], labels: Sequence[str], options: Any) -> Any:
        """Returns a dummy label."""
        return 0

    def show_targets(
        self, row: Encoded, names: Sequence[str], kind: str, decoder: Any
    ) -> list[str | None]:
        """Mark the answers' tokens, which are scored as a whole."""
        labels = row.labels if isinstance(row.labels, list) else []
        return [None if label == IGNORED else "" for label in labels]

    def describe_head(self, labels: Sequence[str]) -> str:
        """Returns a description that differs from those of other heads."""
        return "a score"


@dataclass(frozen=True)
class RewardObjective(Objective):
    """Logistic loss of score differences: logits `(2 · pairs, 1)`, preferred answer first.

    Labels are verdicts `(2 · pairs, 3)`, whose last column is the margin. `settings.center` is the
    weight of the centering term.
    """

    settings: PreferenceConfig = field(default_factory=PreferenceConfig)

    per_row: ClassVar[bool] = True
    has_choice: ClassVar[bool] = False
    metric_names: ClassVar[tuple[str, ...]] = (
        "accuracy",
        "margin",
        "score_chosen",
        "score_rejected",
        "ece",
        "length_correlation",
    )

    def split(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Returns the model inputs, and the verdicts if present."""
        inputs, labels = super().split(batch)
        return inputs, batch.get("verdicts", labels)

    def count(self, labels: Tensor) -> Tensor:
        """Count the pairs (a scalar)."""
        import torch

        return torch.tensor(labels.shape[0] // 2, device=labels.device)

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns the summed loss of the pairs."""
        scores = logits.float().flatten()
        margins = labels[::2, 2].float()
        return bradley_terry(scores[::2], scores[1::2], margins, self.settings.center).sum()

    def meter(self) -> Meter:
        """Returns a `ScoreMeter`."""
        return ScoreMeter()


class ScoreMeter:
    """Accuracy, margin and calibration of scores, and their correlation with length."""

    def __init__(self) -> None:
        self._seen: list[np.ndarray] = []

    def update(self, logits: Tensor, labels: Tensor, rows: Sequence[Any]) -> None:
        """Add the scores `(2 · pairs, 1)` of the pairs `rows`."""
        scores = logits.cpu().double().flatten().numpy().reshape(-1, 2)
        lengths = [[len(branch.input_ids) for branch in row.branches] for row in rows]
        self._seen.append(np.concatenate([scores, np.array(lengths, dtype=float)], axis=1))

    def pool(self, meters: Sequence[ScoreMeter]) -> ScoreMeter:
        """Returns a meter of the pairs of all `meters`."""
        pooled = ScoreMeter()
        pooled._seen = [part for meter in meters for part in meter._seen]
        return pooled

    def compute(self, loss: float) -> dict[str, float]:
        """Compute the metrics; a tie counts as wrong."""
        good, bad, good_length, bad_length = np.concatenate(self._seen).T
        margins, longer = good - bad, good_length - bad_length
        metrics = {
            "accuracy": float((margins > 0).mean()),
            "margin": float(margins.mean()),
            "score_chosen": float(good.mean()),
            "score_rejected": float(bad.mean()),
            "ece": calibration_error(margins),
        }
        if len(margins) > 1 and margins.std() > 0 and longer.std() > 0:
            metrics["length_correlation"] = float(np.corrcoef(margins, longer)[0, 1])
        return metrics

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns the scores of the only pair seen."""
        good, bad = np.concatenate(self._seen)[0, :2]
        return {"score_chosen": round(float(good), 4), "score_rejected": round(float(bad), 4)}


def calibration_error(margins: np.ndarray) -> float:
    """Returns the expected calibration error over ten bins (Guo et al., 2017)."""
    confidence = 1 / (1 + np.exp(-np.abs(np.clip(margins, -500, 500))))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    total = 0.0
    for number in range(BINS):
        selected = bins == number
        if selected.any():
            total += selected.sum() * abs(
                (margins[selected] > 0).mean() - confidence[selected].mean()
            )
    return float(total / len(margins)) if len(margins) else math.nan


def _scored_shape(shape: FormatSpec) -> FormatSpec:
    """Returns a layout of labeled answers without the label."""
    required = {role: names for role, names in shape.required.items() if role != "label"}
    return FormatSpec(
        " + ".join(required), build_scored, required, shape.optional, shape.guessable, shape.inner
    )


_CLASS = "AutoModelForSequenceClassification"
_BARE: dict[str, Any] = {
    "name": "reward",
    "shapes": PAIR_SHAPES,
    "questions": tuple(map(_scored_shape, JUDGED_SHAPES)),
    "auto_classes": {"encoder": _CLASS, "decoder": _CLASS},
    "peft_types": {"encoder": "SEQ_CLS", "decoder": "SEQ_CLS"},
    "headline": "accuracy",
    "settings": PreferenceConfig(loss="reward"),
}

TASKS = (RewardTask(**_BARE),)
