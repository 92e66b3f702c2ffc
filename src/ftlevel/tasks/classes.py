"""Text classification (single-label, multi-label) and regression: task, objectives and metrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import encode_labeled
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.formats.detect import ExampleBuilder, Format, FormatSpec, RoleValues
from ftlevel.data.formats.examples import (
    LabeledText,
    create_labeled_text,
    create_multi_label_text,
    create_regression_text,
)
from ftlevel.data.formats.labels import LabelSet, choose_problem_type
from ftlevel.data.sources.table import Row, Table
from ftlevel.errors import InputError, join_names
from ftlevel.objectives import Meter, Objective, TrainingLoss
from ftlevel.tasks.base import (
    BaseTask,
    Column,
    OutputOptions,
    Prediction,
    PromptedModel,
    check_options,
    rank,
)
from ftlevel.tasks.losses import (
    ClassObjective,
    PredictionMeter,
    compute_pos_weight,
    entropy,
    mean_entropy,
    weighted_binary_cross_entropy,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.prepare.encoder import Encoder
    from ftlevel.data.prepare.loading import LoadedData
    from ftlevel.models.sources import ModelSource


class ClassMeter(PredictionMeter):
    """Meter of single-label classification: accuracy, macro F1 and Matthews correlation."""

    def update(self, logits: Tensor, labels: Tensor, rows: Sequence[Any]) -> None:
        self.predicted += logits.argmax(-1).tolist()
        self.true += labels.tolist()

    def compute(self, loss: float) -> dict[str, float]:
        """Compute accuracy, F1 (its mean over the classes that occur) and MCC (-1 to 1)."""
        true, predicted = (np.asarray(side, np.int64) for side in (self.true, self.predicted))
        count, size = len(true), int(max(true.max(), predicted.max())) + 1
        of_true, of_predicted = (np.bincount(side, minlength=size) for side in (true, predicted))
        hits = np.bincount(true[true == predicted], minlength=size)
        occurs = of_true + of_predicted > 0
        right, true_pairs = int(hits.sum()), count**2 - int(of_true @ of_true)
        product = true_pairs * (count**2 - int(of_predicted @ of_predicted))
        agreed = right * count - int(of_true @ of_predicted)
        return {
            "accuracy": right / count,
            "f1": float(np.mean(2 * hits[occurs] / (of_true + of_predicted)[occurs])),
            "mcc": agreed / math.sqrt(product) if product else 0.0,
        }


class MultiLabelMeter(PredictionMeter):
    """Meter of multi-label classification: F1 and subset accuracy at probability 0.5."""

    def update(self, logits: Tensor, labels: Tensor, rows: Sequence[Any]) -> None:
        self.predicted += (logits > 0).int().tolist()
        self.true += labels.int().tolist()

    def compute(self, loss: float) -> dict[str, float]:
        """Compute micro and macro F1, and the share of rows with all labels correct."""
        true, predicted = (np.asarray(side, bool) for side in (self.true, self.predicted))
        hits = 2 * (true & predicted).sum(0)  # scikit-learn takes a single column as two classes
        labels = true.sum(0) + predicted.sum(0)
        return {
            "micro_f1": float(hits.sum() / max(labels.sum(), 1)),
            "macro_f1": float(np.mean(hits / np.maximum(labels, 1))),
            "subset_accuracy": float((true == predicted).all(1).mean()),
        }


class RegressionMeter(PredictionMeter):
    """Meter of regression: root mean squared error, Pearson and Spearman correlation."""

    def update(self, logits: Tensor, labels: Tensor, rows: Sequence[Any]) -> None:
        self.predicted += logits.float().squeeze(-1).tolist()
        self.true += labels.tolist()

    def compute(self, loss: float) -> dict[str, float]:
        """Compute RMSE from `loss`, the MSE, and correlations unless one side is constant."""
        from scipy.stats import pearsonr, spearmanr

        scores = {"rmse": math.sqrt(loss)}
        if len(set(self.predicted)) > 1 and len(set(self.true)) > 1:
            scores["pearson"] = float(pearsonr(self.predicted, self.true)[0])
            scores["spearman"] = float(spearmanr(self.predicted, self.true)[0])
        return scores


NO_LABEL = "(no label)"
_SINGLE, _SEVERAL, _QUANTITY = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
_BUILDERS = {
    _SINGLE: create_labeled_text,
    _SEVERAL: create_multi_label_text,
    _QUANTITY: create_regression_text,
}
_LABEL = ("label", "labels", "class", "category", "sentiment", "intent", "emotion")
_TEXT = ("text", "sentence", "content", "review", "body", "comment", "message")
_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
)


@dataclass(frozen=True)
class ClassTask(BaseTask):
    """Task with one target per row: a class, several classes or a number."""

    has_new_head: ClassVar[bool] = True
    synthetic_labels: ClassVar[tuple[str, ...]] = ("0", "1")
    finds_ends_by_padding: ClassVar[bool] = True

    def synthetic_row(self, ids: list[int], row: int) -> Encoded:
        return Encoded(ids, row % len(self.synthetic_labels), row)

    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        problem = data_info.get("problem_type")
        if problem == _SEVERAL:
            return MultiLabel("micro_f1")
        return Regression("pearson") if problem == _QUANTITY else Classes(self.headline)

    def inference_config(self, config: DataConfig, data_info: Mapping[str, Any]) -> dict[str, Any]:
        return {"problem_type": data_info["problem_type"]}

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        labels = read_labels(model_config)
        usual = _QUANTITY if len(labels) == 1 else _SINGLE
        return {"labels": labels, "options": {"problem_type": model_config.problem_type or usual}}

    def get_format(
        self, column_names: Sequence[str], config: DataConfig, rows: Sequence[Row] = ()
    ) -> Format:
        """Returns the format of a table; raises `InputError` if the labels are character spans."""
        format_ = super().get_format(column_names, config, rows)
        column = format_.columns["label"]
        values = [row.get(column) for row in rows]
        spans = next((value for value in values if isinstance(value, list) and value), [None])
        if isinstance(spans[0], (list, dict)):
            raise InputError(
                f"{column!r} holds spans of characters, which are for --task token-classification, "
                f"not --task {self.name}. Change the task, or use --map label=COLUMN."
            )
        return format_

    def update_format(
        self, format_: Format, table: Table, config: DataConfig
    ) -> tuple[Format, list[Choice]]:
        """Returns `format_` with the problem type, which determines how examples are built."""
        problem, reason = choose_problem_type(table, format_.columns["label"], config.problem_type)
        completed = replace(format_, build=_BUILDERS[problem], options={"problem_type": problem})
        return completed, [Choice("problem", problem, reason)]

    def label_role(self, format_: Format) -> str | None:
        return None if format_.options["problem_type"] == _QUANTITY else "label"

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        encode = partial(
            encode_labeled, encoder.tokenizer, target_of=partial(_get_target, encoder.labels)
        )
        return encoder.fit(encoder.collect(encode, examples), table)

    def check_training_set(self, training_set: Sequence[Any]) -> Sequence[tuple[str, int, str]]:
        """Returns the failed check `one_class` if almost all examples have the same class."""
        from ftlevel.data.gate.checks import get_majority_class

        if not training_set or isinstance(training_set[0].label, float):
            return ()
        largest = get_majority_class(e.label for e in training_set)
        return () if largest is None else [("one_class", largest[1], f"label {largest[0]!r}")]

    def data_info(self, loaded: LoadedData) -> Mapping[str, Any]:
        return {"problem_type": loaded.format.options["problem_type"]}

    def describe_rows(self, loaded: LoadedData, data_info: Mapping[str, Any]) -> list[Choice]:
        return []

    def prediction_columns(
        self,
        format_: Format,
        labels: Sequence[str],
        inference_config: Mapping[str, Any],
        outputs: OutputOptions,
    ) -> dict[str, Column]:
        problem = inference_config.get("problem_type")
        if problem == _QUANTITY:
            check_options(outputs, "a regression", "")
            return {"": "number"}
        columns: dict[str, Column] = {"": "texts" if problem == _SEVERAL else "text"}
        if outputs.probabilities:
            columns |= {_probability(label): "number" for label in labels}
        if outputs.top_k:
            columns["top"] = "ranking"
        return columns

    def create_query(self, prompt: str, context: str | None, number: int) -> Any:
        return LabeledText(prompt, None, 0, number)

    def predict(
        self, model: PromptedModel, queries: Sequence[Any], outputs: OutputOptions
    ) -> list[Prediction]:
        rows = encode_labeled(model.tokenizer, queries, lambda _: 0)
        return model.score(rows, lambda _, logits: _parse_label(model, logits.float(), outputs))

    def dummy_labels(self, ids: Sequence[int], labels: Sequence[str], inference_config: Any) -> Any:
        """Returns a dummy label: class 0, no class (multi-label) or 0.0 (regression)."""
        problem = inference_config.get("problem_type")
        if problem == _SEVERAL:
            return (0.0,) * len(labels)
        return 0.0 if problem == _QUANTITY else 0

    def decode_label(self, row: Encoded, names: Sequence[str]) -> str:
        labels = row.labels
        if isinstance(labels, tuple):
            return (
                join_names((n for n, on in zip(names, labels, strict=True) if on), 20) or "(none)"
            )
        return names[labels] if isinstance(labels, int) and names else str(labels)


def read_labels(model_config: Any) -> list[str]:
    """Returns the class names of a model config, ordered by id."""
    return [str(model_config.id2label[index]) for index in sorted(model_config.id2label)]


def _get_target(labels: LabelSet | None, example: LabeledText) -> int | float | tuple[float, ...]:
    label = example.label
    if isinstance(label, float):
        return label
    if labels is None:
        raise TypeError("a class has a label set")
    if isinstance(label, tuple):
        true = {labels.id_of(name) for name in label}
        return tuple(float(i in true) for i in range(len(labels)))
    return labels.id_of(label)


def create_text(values: RoleValues) -> LabeledText:
    """Create an example of a text or text pair without a label."""
    pair = values.text("text_pair") if "text_pair" in values else None
    return LabeledText(values.text("text"), pair, 0, values.index)


def _parse_label(model: PromptedModel, logits: Tensor, outputs: OutputOptions) -> Prediction:
    problem = model.options.get("problem_type")
    if problem == _QUANTITY:
        quantity = float(logits[0])
        return Prediction(f"{quantity:.4f}", columns={"": quantity})
    several = problem == _SEVERAL
    shares = logits.sigmoid() if several else logits.softmax(-1)
    scores = dict(zip(model.labels, shares.tolist(), strict=True))
    columns: dict[str, Any] = {"top": rank(scores, outputs.top_k)} if outputs.top_k else {}
    if outputs.probabilities:
        columns |= {_probability(label): score for label, score in scores.items()}
    if several:
        above = [label for label, share in scores.items() if share > 0.5]
        return Prediction(", ".join(above) or NO_LABEL, scores, columns={"": above, **columns})
    best = max(scores, key=lambda label: scores[label])
    return Prediction(best, scores, columns={"": best, **columns})


def _probability(label: str) -> str:
    return f"probability_{label}"


@dataclass(frozen=True)
class Classes(ClassObjective):
    """Objective: cross entropy of rows, logits `(batch, classes)`, labels `(batch,)`."""

    per_row: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "mcc")

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.cross_entropy(logits.float(), labels, reduction="sum")

    def meter(self) -> Meter:
        return ClassMeter()

    def guess_loss(self, rows: Sequence[Encoded]) -> float | None:
        """Returns the entropy of the class frequencies, the loss of always predicting these."""
        return entropy(row.labels for row in rows if isinstance(row.labels, int))


@dataclass(frozen=True)
class MultiLabel(Objective):
    """Objective: binary cross entropy, logits and float labels `(batch, classes)`."""

    per_row: ClassVar[bool] = True
    has_classes: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "subset_accuracy")

    def choices(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns logits `(batch * classes, 2)`: each binary logit z as the two choices 0 and z."""
        import torch

        flat = logits.reshape(-1, 1)
        return torch.cat([torch.zeros_like(flat), flat], dim=1)

    def count(self, labels: Tensor) -> Tensor:
        return labels.new_full((), labels.numel())

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns the cross entropy summed over all classes of all rows, in nats."""
        from torch.nn import functional

        return functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")

    def training_sum(
        self, logits: Tensor, labels: Tensor, mask: Tensor, loss: TrainingLoss
    ) -> Tensor:
        return weighted_binary_cross_entropy(logits.float(), labels, loss)

    def balance(self, rows: Sequence[Encoded], classes: int) -> tuple[float, ...]:
        """Returns for each class the ratio of rows without it to rows with it, as `pos_weight`."""
        return compute_pos_weight(row.labels for row in rows if isinstance(row.labels, tuple))

    def meter(self) -> Meter:
        return MultiLabelMeter()

    def guess_loss(self, rows: Sequence[Encoded]) -> float | None:
        """Returns the mean binary entropy of the classes, the loss of predicting frequencies."""
        answers = [row.labels for row in rows if isinstance(row.labels, tuple)]
        return mean_entropy(zip(*answers, strict=True))


@dataclass(frozen=True)
class Regression(Objective):
    """Objective: squared error of rows, logits `(batch, 1)`, float labels `(batch,)`."""

    per_row: ClassVar[bool] = True
    has_choice: ClassVar[bool] = False
    metric_names: ClassVar[tuple[str, ...]] = ("rmse", "pearson", "spearman")

    def count(self, labels: Tensor) -> Tensor:
        """Count the rows; unlike class ids, a label of -100.0 is not ignored."""
        return labels.new_full((), labels.numel())

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.mse_loss(logits.float().squeeze(-1), labels, reduction="sum")

    def meter(self) -> Meter:
        return RegressionMeter()

    def guess_loss(self, rows: Sequence[Encoded]) -> float | None:
        """Returns the variance of the labels: the loss of always predicting their mean."""
        values = [row.labels for row in rows if isinstance(row.labels, float)]
        return statistics.pvariance(values) if values else None


def _layouts(build: ExampleBuilder, label: Mapping[str, tuple[str, ...]]) -> tuple[FormatSpec, ...]:
    name = " + ".join(("", *label))
    pairs = (
        FormatSpec(
            f"text + text_pair{name}",
            build,
            {"text": (first,), "text_pair": (second,), **label},
            guessable=False,
        )
        for first, second in _PAIRS
    )
    return (*pairs, FormatSpec(f"text{name}", build, {"text": _TEXT, **label}))


_CLASS = "AutoModelForSequenceClassification"

TASKS = (
    ClassTask(
        name="text-classification",
        shapes=_layouts(create_labeled_text, {"label": _LABEL}),
        query_shapes=_layouts(create_text, {}),
        auto_classes={"encoder": _CLASS, "decoder": _CLASS, "encoder-decoder": _CLASS},
        peft_types={"encoder": "SEQ_CLS", "decoder": "SEQ_CLS", "encoder-decoder": "SEQ_CLS"},
        headline="accuracy",
    ),
)
