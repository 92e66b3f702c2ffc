"""Reward models: a model that scores answers learns from pairs of them (Bradley and Terry)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftlevel.config.preference import PreferenceConfig
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.formats.detect import Format, Shape
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.task import Checks, Meter, Objective
from ftlevel.tasks.base import Column, PromptedModel, Reply, Wanted, refuse_wishes
from ftlevel.tasks.preferences.formats import JUDGED_SHAPES, PAIR_SHAPES, build_scored
from ftlevel.tasks.preferences.losses import bradley_terry
from ftlevel.tasks.preferences.policy import JudgedTask
from ftlevel.tasks.preferences.rows import JudgedEncoder

if TYPE_CHECKING:
    import torch

    from ftlevel.data.encoding.fit import Fitted
    from ftlevel.data.prepare.encoder import Encoder
    from ftlevel.data.prepare.loading import Loaded

BINS = 10
"""Bins of the calibration error."""


@dataclass(frozen=True)
class RewardTask(JudgedTask):
    """A model with one score for each answer."""

    has_new_head: ClassVar[bool] = True
    finds_ends_by_padding: ClassVar[bool] = True
    scored: ClassVar[bool] = True
    imagined_facts: ClassVar[Mapping[str, Any]] = {"problem_type": "regression"}
    head_like: ClassVar[str] = "text-classification"
    pads_apart: ClassVar[bool] = True
    checks: ClassVar[Checks] = Checks(ends=True)

    def build_objective(self, kind: str, facts: Mapping[str, Any]) -> Objective:
        """Return the logistic loss of the difference between the scores of a pair."""
        return Rewards("accuracy", settings=self._told(facts))

    def _told(self, facts: Mapping[str, Any]) -> PreferenceConfig:
        return self.configured(facts).settings if "preference" in facts else self.settings

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> Fitted:
        """Return prompts with two answers."""
        return self.encode_as(encoder, examples, table, scored=True)

    def facts(self, loaded: Loaded) -> Mapping[str, Any]:
        """Return the loss, and that the head has one score."""
        return {**super().facts(loaded), "problem_type": "regression"}

    def card_options(self, config: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the loss, and that the head has one score."""
        return {**super().card_options(config, facts), "problem_type": "regression"}

    def stand_in(self, model_config: Any, tokenizer: Any, kind: str) -> dict[str, Any]:
        """Return a prompt as `train` would lay it out, and that the head has one score."""
        if model_config.num_labels != 1:
            raise InputError(
                f"a reward model has one score, and this one has {model_config.num_labels} "
                "classes. Name another, or --task text-classification."
            )
        form = self.prompt_format(Format(self.name, "", build_scored, {}), kind, tokenizer)
        return {
            "prompt": form.to_dict() if form else {},
            "options": {"problem_type": "regression", "preference": {"loss": "reward"}},
        }

    def pose(self, prompt: str, context: str | None, number: int) -> Any:
        """Return an answer without a question: the last turn of a chat is scored by its prompt."""
        raise InputError(
            "a reward model scores answers to prompts. Ask it by ftlevel predict, with columns "
            "prompt and completion."
        )

    def answer_columns(
        self, format_: Format, labels: Sequence[str], options: Mapping[str, Any], wanted: Wanted
    ) -> dict[str, Column]:
        """Return the score."""
        refuse_wishes(wanted, "a reward model", "")
        return {"": "number"}

    def answer_rows(
        self, model: PromptedModel, questions: Sequence[Any], wanted: Wanted
    ) -> list[Reply]:
        """Return the score of each answer."""
        if model.prompt_format is None:
            raise TypeError("answers have a prompt format")
        encode = JudgedEncoder(model.tokenizer, model.prompt_format, model.kind, True, True, False)
        rows = [
            Encoded(row.input_ids, 0, index)
            for index, question in enumerate(questions)
            for row in encode.answers([question])
        ]

        def read(_: Encoded, logits: torch.Tensor) -> Reply:
            score = float(logits.float().reshape(-1)[0])
            return Reply(f"{score:.4g}", {"score": score}, columns={"": score})

        return model.score(rows, read)

    def probe_labels(self, ids: Sequence[int], labels: Sequence[str], options: Any) -> Any:
        """Return a number that says nothing."""
        return 0

    def show_targets(
        self, row: Encoded, names: Sequence[str], kind: str, speller: Any
    ) -> list[str | None]:
        """Return the answers' tokens: both are scored as a whole."""
        labels = row.labels if isinstance(row.labels, list) else []
        return [None if label == IGNORED else "" for label in labels]

    def describe_head(self, labels: Sequence[str]) -> str:
        """Return what tells the head apart."""
        return "a score"


@dataclass(frozen=True)
class Rewards(Objective):
    """Logistic loss of a difference of scores: logits `(2 · pairs, 1)`, the preferred one first.

    Labels are verdicts (2 · pairs, 3), whose last column is the margin.

    Attributes:
        settings: the weight of the centring.
    """

    settings: PreferenceConfig = field(default_factory=PreferenceConfig)

    per_row: ClassVar[bool] = True
    has_choice: ClassVar[bool] = False

    def split(self, batch: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
        """Return what the model is called with, and the verdicts where there are some."""
        inputs, labels = super().split(batch)
        return inputs, batch.get("verdicts", labels)

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the number of pairs (a scalar)."""
        import torch

        return torch.tensor(labels.shape[0] // 2, device=labels.device)

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the summed loss of the pairs."""
        scores = logits.float().flatten()
        margins = labels[::2, 2].float()
        return bradley_terry(scores[::2], scores[1::2], margins, self.settings.center).sum()

    @property
    def metrics(self) -> tuple[str, ...]:
        """What its meter computes."""
        return ("accuracy", "margin", "score_chosen", "score_rejected", "ece", "length_correlation")

    def meter(self) -> Meter:
        """Return a `RewardMeter`."""
        return RewardMeter()


class RewardMeter:
    """Accuracy, margin and calibration of scores, and whether they follow the length."""

    def __init__(self) -> None:
        self._seen: list[np.ndarray] = []

    def update(self, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Any]) -> None:
        """Add the scores (2 · pairs, 1) of `rows`, which are pairs."""
        scores = logits.cpu().double().flatten().numpy().reshape(-1, 2)
        lengths = [[len(branch.input_ids) for branch in row.branches] for row in rows]
        self._seen.append(np.concatenate([scores, np.array(lengths, dtype=float)], axis=1))

    def pool(self, meters: Sequence[RewardMeter]) -> RewardMeter:
        """Return a meter of all their pairs."""
        pooled = RewardMeter()
        pooled._seen = [part for meter in meters for part in meter._seen]
        return pooled

    def compute(self, loss: float) -> dict[str, float]:
        """Return the metrics; a tie is no success."""
        good, bad, good_length, bad_length = np.concatenate(self._seen).T
        apart, longer = good - bad, good_length - bad_length
        found = {
            "accuracy": float((apart > 0).mean()),
            "margin": float(apart.mean()),
            "score_chosen": float(good.mean()),
            "score_rejected": float(bad.mean()),
            "ece": calibration_error(apart),
        }
        if len(apart) > 1 and apart.std() > 0 and longer.std() > 0:
            found["length_correlation"] = float(np.corrcoef(apart, longer)[0, 1])
        return found

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the scores of the only pair seen."""
        good, bad = np.concatenate(self._seen)[0, :2]
        return {"score_chosen": round(float(good), 4), "score_rejected": round(float(bad), 4)}


def calibration_error(apart: np.ndarray) -> float:
    """Return how far σ of the difference is from the share that is right, over ten bins.

    A pair counts as the model sees it: with the answer first that it prefers (Guo et al., 2017).
    """
    sure = 1 / (1 + np.exp(-np.abs(np.clip(apart, -500, 500))))
    bins = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    total = 0.0
    for number in range(BINS):
        here = bins == number
        if here.any():
            total += here.sum() * abs((apart[here] > 0).mean() - sure[here].mean())
    return float(total / len(apart)) if len(apart) else math.nan


def _scored_shape(shape: Shape) -> Shape:
    """Return a shape of judged answers without the verdict."""
    required = {role: names for role, names in shape.required.items() if role != "label"}
    return Shape(
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
