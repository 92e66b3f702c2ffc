"""Preference training on answer pairs or labeled answers, and Bradley-Terry reward models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.prompts import PromptFormat, choose_format
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.data.formats.detect import Format, FormatSpec, fits
from ftlevel.data.sources.table import Row, Table
from ftlevel.errors import InputError
from ftlevel.extras.preference.config import LOSSES, NO_REFERENCE, SMOOTHING, PreferenceConfig
from ftlevel.extras.preference.formats import JUDGED_SHAPES, PAIR_SHAPES, create_scored
from ftlevel.extras.preference.objective import bradley_terry, create_preferences
from ftlevel.extras.preference.rows import (
    ContrastedRows,
    LabeledAnswerRow,
    PairRow,
    PreferenceEncoder,
    check_answers,
    check_pairs,
    create_pair_row,
)
from ftlevel.objectives import Checks, Meter, Objective
from ftlevel.tasks.base import (
    BaseTask,
    Column,
    OutputOptions,
    Prediction,
    PromptedModel,
    TokenDecoder,
)
from ftlevel.tasks.text import TEXT_FIELDS, TextTask

if TYPE_CHECKING:
    from torch import Tensor

    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.gate.checks import Mask
    from ftlevel.data.prepare.encoder import Encoder, EncodingContext, PreparedData
    from ftlevel.data.prepare.loading import LoadedData
    from ftlevel.models.sources import ModelSource


_HIDDEN = ("loss", "reference")
"""Options that the log line of the loss omits."""


@dataclass(frozen=True)
class PreferenceBaseTask(BaseTask):
    """Base class of the preference and reward tasks; `scored`: whether it trains reward models."""

    config: PreferenceConfig = field(default_factory=PreferenceConfig)
    smoothing: float = 0.0

    scored: ClassVar[bool] = False

    def configured(self, task_config: Mapping[str, Any]) -> PreferenceBaseTask:
        values = dict(task_config.get("preference", {}))
        smoothing = values.pop("smoothing", 0.0)
        config = PreferenceConfig(**values)
        if config.loss_properties.smoothed and not smoothing:
            smoothing = SMOOTHING
        return replace(self, config=config, smoothing=smoothing)

    @property
    def encoding_config(self) -> Mapping[str, Any]:
        return {"loss": self.config.loss, "referenced": self.config.uses_reference}

    def get_format(
        self, column_names: Sequence[str], config: DataConfig, rows: Sequence[Row] = ()
    ) -> Format:
        """Returns the format; the error for single labeled answers suggests `--loss kto`."""
        loss, is_mapped = self.config.loss, config.columns or config.format
        if (
            self.config.loss_properties.paired
            and not is_mapped
            and not fits(column_names, PAIR_SHAPES)
        ):
            if fits(column_names, JUDGED_SHAPES):
                raise InputError(
                    f"--loss {loss} needs pairs of answers, and these rows have one rated answer "
                    f"each. Use --loss kto."
                )
            half = {"chosen", "rejected"} & {column.lower() for column in column_names}
            if len(half) == 1:
                present, missing = half.copy().pop(), ({"chosen", "rejected"} - half).pop()
                raise InputError(
                    f"there is a column {present!r}, and no {missing!r}: --task {self.name} "
                    f"needs pairs of answers. Use --map {missing}=COLUMN."
                )
        task = (
            self
            if self.config.loss_properties.paired
            else replace(self, shapes=(*JUDGED_SHAPES, *PAIR_SHAPES))
        )
        return BaseTask.get_format(task, column_names, config, rows)

    def update_format(
        self, format_: Format, table: Table, config: DataConfig
    ) -> tuple[Format, list[Choice]]:
        return format_, []

    def prompt_format(self, format_: Format, kind: str, tokenizer: Any) -> PromptFormat | None:
        return choose_format(tokenizer, kind, self.instruction, self.answer_cue)

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        if encoder.prompt_format is None:
            raise TypeError("judged answers have a prompt format")
        config, seq2seq = self.config, encoder.kind == "encoder-decoder"
        encode = PreferenceEncoder(
            encoder.tokenizer,
            encoder.prompt_format,
            encoder.kind,
            config.loss == "kto",
            self.scored,
            config.uses_reference,
        )
        fitted = encoder.fit(encoder.collect(encode, examples), table)
        return encoder.fit_targets(fitted, table) if seq2seq else fitted

    def check_rows(self, rows: Sequence[Encoded]) -> Mapping[str, Mask]:
        return check_pairs(rows)

    def check_training_set(self, training_set: Sequence[Any]) -> Sequence[tuple[str, int, str]]:
        return check_answers(training_set, self.config.loss or "dpo")

    def data_info(self, loaded: LoadedData) -> Mapping[str, Any]:
        return {"preference": self.loss_config}

    def describe_rows(self, loaded: LoadedData, data_info: Mapping[str, Any]) -> list[Choice]:
        values = {name: value for name, value in self.loss_config.items() if name not in _HIDDEN}
        if "beta" in values:
            values["beta"] = self.config.effective_beta
        if "simpo_gamma" in values:
            values["simpo_gamma"] = self.config.margin
        shown = ", ".join(
            f"{name.replace('_', ' ')} {value:g}"
            if isinstance(value, float | int)
            else f"{name.replace('_', ' ')} {value}"
            for name, value in values.items()
        )
        return [Choice("loss", self.config.loss, shown), *super().describe_rows(loaded, data_info)]

    @property
    def loss_config(self) -> dict[str, Any]:
        """Loss and its hyperparameters, as stored in a model card."""
        read = ("loss", *LOSSES[self.config.loss or "dpo"].parameters)
        values = {name: getattr(self.config, name) for name in read}
        return values | (
            {"smoothing": self.smoothing} if self.config.loss_properties.smoothed else {}
        )

    def inference_config(self, config: DataConfig, data_info: Mapping[str, Any]) -> dict[str, Any]:
        return {"preference": data_info["preference"]}

    def synthetic_row(self, ids: list[int], row: int) -> Encoded:
        """Returns a synthetic row: three quarters of `ids` as prompt, the rest as answers."""
        prompt, reference = len(ids) - max(1, len(ids) // 4), () if self.scored else (0.0, 0.0)
        labels, answer = ([IGNORED] * prompt + ids[prompt:]), ids[: len(ids) - prompt]
        if not self.config.loss_properties.paired:
            return LabeledAnswerRow(ids, labels, row, {}, prompt, row % 2, reference)
        one = Encoded(ids, labels, row)
        two = Encoded(ids[:prompt] + answer, labels[:prompt] + answer, row)
        pair = create_pair_row(one, two, prompt, 0.0, scored=self.scored)
        return replace(pair, reference=reference)

    def decode_label(self, row: Encoded, names: Sequence[str]) -> str:
        """Returns the token ranges of a pair's prompt and answers, or a single answer's label."""
        if isinstance(row, PairRow):
            first = row.prompt + row.chosen
            return (
                f"prompt: tokens 1-{row.prompt}, preferred: {row.prompt + 1}-{first}, "
                f"rejected: {first + 1}-{len(row.input_ids)}"
            )
        return (
            ("desirable" if row.desirable else "undesirable")
            if isinstance(row, LabeledAnswerRow)
            else ""
        )


@dataclass(frozen=True)
class PreferenceTask(PreferenceBaseTask, TextTask):
    """Task of training a text-generating model on preferences, e.g. with DPO."""

    trains_language_head: ClassVar[bool] = True
    hooks: ClassVar[str] = "ftlevel.extras.preference.hooks:PreferenceHooks"

    def merged_options(self, options: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        """Returns `options` without the reference model, which is lost in a merged model."""
        own = options.get("preference", {})
        if own.get("reference", NO_REFERENCE) == NO_REFERENCE:
            return options, ""
        note = "the reference model is not available: no rewards are computed, and the loss has "
        return {**options, "preference": {**own, "reference": NO_REFERENCE}}, f"{note}no reference"

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        alone = {"preference": {"loss": "dpo", "reference": "none"}}
        return {**super().card_defaults(source, model_config, tokenizer, kind), "options": alone}

    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        task = self.configured(data_info) if "preference" in data_info else self
        return create_preferences(task.config, task.smoothing, kind)

    def finish_data(
        self, prepared: PreparedData, config: DataConfig, context: EncodingContext
    ) -> PreparedData:
        """Returns `prepared`; for the loss kto, each row also gets an answer to another prompt."""
        if self.config.loss != "kto":
            return prepared
        max_length, held_out = prepared.max_length, prepared.validation
        return replace(
            prepared,
            train=ContrastedRows(prepared.train, max_length),
            validation=ContrastedRows(held_out, max_length) if len(held_out) else held_out,
        )

    def evaluation_rows(
        self, rows: Sequence[Encoded], config: DataConfig, context: EncodingContext
    ) -> Sequence[Encoded]:
        if self.config.loss != "kto":
            return rows
        return ContrastedRows(rows, max(row.length for row in rows))

    def decode_targets(
        self, row: Encoded, names: Sequence[str], kind: str, decoder: TokenDecoder
    ) -> list[str | None]:
        """Returns each token's target; "preferred" or "rejected" where an answer begins."""
        targets = super().decode_targets(row, names, kind, decoder)
        if not isinstance(row, PairRow) or row.is_apart:
            return targets
        for start, name in ((row.prompt, "preferred"), (row.prompt + row.chosen, "rejected")):
            first = next((at for at in range(start, len(targets)) if targets[at] is not None), None)
            if first is not None:
                targets[first] = name
        return targets


BINS = 10
"""Number of bins of the calibration error."""


@dataclass(frozen=True)
class RewardTask(PreferenceBaseTask):
    """Task of a model with one scalar score per answer."""

    has_new_head: ClassVar[bool] = True
    finds_ends_by_padding: ClassVar[bool] = True
    scored: ClassVar[bool] = True
    synthetic_info: ClassVar[Mapping[str, Any]] = {"problem_type": "regression"}
    head_like: ClassVar[str] = "text-classification"
    separates_padding: ClassVar[bool] = True
    predicts_training_rows: ClassVar[bool] = False
    model_description: ClassVar[str] = "a reward model"
    prediction_type: ClassVar[Column] = "number"
    checks: ClassVar[Checks] = Checks(ends=True)

    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        """Create the objective with the logistic loss of each pair's score difference."""
        task = self.configured(data_info) if "preference" in data_info else self
        return RewardObjective("accuracy", config=task.config)

    def data_info(self, loaded: LoadedData) -> Mapping[str, Any]:
        return {**super().data_info(loaded), "problem_type": "regression"}

    def inference_config(self, config: Any, data_info: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().inference_config(config, data_info), "problem_type": "regression"}

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        """Returns prompt format and options; `InputError` if the model has more than one label."""
        if model_config.num_labels != 1:
            raise InputError(
                f"a reward model has one score, and this one has {model_config.num_labels} "
                "classes. Choose another, or --task text-classification."
            )
        return {
            "prompt": choose_format(tokenizer, kind, self.instruction, self.answer_cue).to_dict(),
            "options": {"problem_type": "regression", "preference": {"loss": "reward"}},
        }

    def create_query(self, prompt: str, context: str | None, number: int) -> Any:
        raise InputError(
            "a reward model scores answers to prompts. Use ftlevel predict with columns prompt "
            "and completion."
        )

    def predict(
        self, model: PromptedModel, queries: Sequence[Any], outputs: OutputOptions
    ) -> list[Prediction]:
        if model.prompt_format is None:
            raise TypeError("answers have a prompt format")
        encode = PreferenceEncoder(
            model.tokenizer, model.prompt_format, model.kind, True, True, False
        )
        rows = [
            Encoded(row.input_ids, 0, index) for index, row in enumerate(encode.answers(queries))
        ]

        def read(_: Encoded, logits: Tensor) -> Prediction:
            score = float(logits.float().reshape(-1)[0])
            return Prediction(f"{score:.4g}", {"score": score}, columns={"": score})

        return model.score(rows, read)

    def dummy_labels(self, ids: Sequence[int], labels: Sequence[str], inference_config: Any) -> Any:
        return 0

    def head_signature(self, labels: Sequence[str]) -> str:
        return "a score"


@dataclass(frozen=True)
class RewardObjective(Objective):
    """Objective of reward models: logits `(2 · pairs, 1)`, each pair's preferred answer first.

    Labels are `preference_labels` `(2 · pairs, 3)`, whose last column is the margin.
    `config.center` is the weight of the centering term.
    """

    config: PreferenceConfig = field(default_factory=PreferenceConfig)

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
        """Returns the model inputs and, as labels, the preference labels if present."""
        inputs, labels = super().split(batch)
        return inputs, batch.get("preference_labels", labels)

    def count(self, labels: Tensor) -> Tensor:

        return labels.new_full((), labels.shape[0] // 2)

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        scores = logits.float().flatten()
        margins = labels[::2, 2].float()
        return bradley_terry(scores[::2], scores[1::2], margins, self.config.center).sum()

    def meter(self) -> Meter:
        return ScoreMeter()


class ScoreMeter:
    """Meter of reward models: accuracy, margin, calibration, and correlation with length."""

    def __init__(self) -> None:
        self._seen: list[np.ndarray] = []

    def update(self, logits: Tensor, labels: Tensor, rows: Sequence[Any]) -> None:
        """Add the pairs `rows`, whose scores are the logits `(2 · pairs, 1)`."""
        scores = logits.cpu().double().flatten().numpy().reshape(-1, 2)
        lengths = [[len(sequence.input_ids) for sequence in row.sequences] for row in rows]
        self._seen.append(np.concatenate([scores, np.array(lengths, dtype=float)], axis=1))

    def merge(self, other: ScoreMeter) -> None:
        self._seen += other._seen

    def pool(self, meters: Sequence[ScoreMeter]) -> ScoreMeter:
        pooled = ScoreMeter()
        for meter in meters:
            pooled.merge(meter)
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
        good, bad = np.concatenate(self._seen)[0, :2]
        return {"score_chosen": round(float(good), 4), "score_rejected": round(float(bad), 4)}


def calibration_error(margins: np.ndarray) -> float:
    """Returns the expected calibration error (Guo et al., 2017) of score margins `(pairs,)`."""
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
    required = {role: names for role, names in shape.required.items() if role != "label"}
    return FormatSpec(
        " + ".join(required), create_scored, required, shape.optional, shape.guessable, shape.inner
    )


_CLASS = "AutoModelForSequenceClassification"

TASKS = (
    PreferenceTask(
        **TEXT_FIELDS | {"name": "preference", "shapes": PAIR_SHAPES, "headline": "reward_accuracy"}
    ),
    RewardTask(
        name="reward",
        shapes=PAIR_SHAPES,
        query_shapes=tuple(map(_scored_shape, JUDGED_SHAPES)),
        auto_classes={"encoder": _CLASS, "decoder": _CLASS},
        peft_types={"encoder": "SEQ_CLS", "decoder": "SEQ_CLS"},
        headline="accuracy",
        config=PreferenceConfig(loss="reward"),
    ),
)
