"""Task `rank`: choose the better one of two texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.data.encoding.row import Encoded
from ftlevel.data.formats.detect import Format, FormatSpec, RoleValues
from ftlevel.data.sources.table import Table
from ftlevel.objectives import Meter, Objective
from ftlevel.tasks.base import BaseTask, Column, OutputOptions, Prediction, PromptedModel
from ftlevel.tasks.losses import PredictionMeter

if TYPE_CHECKING:
    import torch

    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.prepare.encoder import Encoder

_SEPARATOR = " ||| "


@dataclass(frozen=True)
class Ranked:
    """Two texts, and which of them is better; `row` is the index into the table."""

    first: str
    second: str
    better: str
    row: int

    @property
    def key_text(self) -> str:
        """Key of the example in data checks."""
        return f"{self.first}\0{self.second}\0{self.better}"

    @property
    def classes(self) -> Sequence[str]:
        """The label."""
        return (self.better,)


@dataclass(frozen=True)
class RankedRow(Encoded):
    """Two encoded texts.

    Attributes:
        second_at: position of the second text.
    """

    second_at: int = field(default=0, metadata={"column": "int"})


def build_ranked(roles: RoleValues) -> Ranked:
    """Return two texts with their label."""
    return Ranked(roles.text("first"), roles.text("second"), roles.text("better"), roles.index)


def build_unranked(roles: RoleValues) -> Ranked:
    """Return two texts without a label."""
    return Ranked(roles.text("first"), roles.text("second"), "", roles.index)


@dataclass(frozen=True)
class RankTask(BaseTask):
    """A task whose target is the better one of two texts."""

    has_new_head: ClassVar[bool] = True
    finds_ends_by_padding: ClassVar[bool] = True

    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        """Return the logistic loss of the difference between the two scores."""
        return Ranking(self.headline)

    def label_role(self, format_: Format) -> str | None:
        """Return `better`."""
        return "better"

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        """Return the concatenated texts, encoded."""
        labels, tokenizer = encoder.labels, encoder.tokenizer

        def encode(batch: Sequence[Ranked]) -> list[Encoded]:
            rows: list[Encoded] = []
            for example in batch:
                first, second = tokenizer([example.first, _SEPARATOR + example.second])["input_ids"]
                label = labels.id_of(example.better) if labels else 0
                rows.append(RankedRow(first + second, label, example.row, {}, len(first)))
            return rows

        return encoder.fit(encoder.collect(encode, examples), table)

    def create_query(self, prompt: str, context: str | None, number: int) -> Any:
        """Return the two texts of a prompt, separated by |||."""
        first, _, second = prompt.partition(_SEPARATOR)
        return Ranked(first, second, "", number)

    def prediction_columns(
        self,
        format_: Format,
        labels: Sequence[str],
        inference_config: Mapping[str, Any],
        outputs: OutputOptions,
    ) -> dict[str, Column]:
        """Return the columns of label and probability."""
        return {"": "text"} | ({"probability": "number"} if outputs.probabilities else {})

    def predict(
        self, model: PromptedModel, queries: Sequence[Any], outputs: OutputOptions
    ) -> list[Prediction]:
        """Return the predicted label of each query."""
        pairs = [model.tokenizer([q.first, _SEPARATOR + q.second])["input_ids"] for q in queries]
        rows = [Encoded(first + second, 0, i) for i, (first, second) in enumerate(pairs)]

        def read_row(row: Encoded, logits: torch.Tensor) -> Prediction:
            scores = dict(zip(model.labels, logits.float().softmax(-1).tolist(), strict=True))
            best = max(scores, key=lambda label: scores[label])
            return Prediction(best, scores, columns={"": best, "probability": scores[best]})

        return model.score(rows, read_row)

    def dummy_labels(self, ids: Sequence[int], labels: Sequence[str], inference_config: Any) -> Any:
        """Return the first one."""
        return 0

    def decode_label(self, row: Encoded, names: Sequence[str]) -> str:
        """Return the label in words."""
        return f"{names[row.labels]} is better" if isinstance(row.labels, int) else ""


@dataclass(frozen=True)
class Ranking(Objective):
    """Logistic loss of a difference: logits `(batch, 2)`, labels `(batch,)`."""

    per_row: ClassVar[bool] = True

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of -log sigmoid of the score difference."""
        from torch.nn import functional

        margin = (logits[:, 1] - logits[:, 0]).float() * (2 * labels - 1)
        return -functional.logsigmoid(margin).sum()

    def meter(self) -> Meter:
        """Return a `RankMeter`."""
        return RankMeter()


class RankMeter(PredictionMeter):
    """Accuracy of the ranking."""

    def update(self, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Any]) -> None:
        """Add a batch: logits `(batch, 2)`, labels `(batch,)`."""
        self.predicted += logits.argmax(-1).tolist()
        self.true += labels.tolist()

    def compute(self, loss: float) -> dict[str, float]:
        """Return the accuracy."""
        correct = sum(p == t for p, t in zip(self.predicted, self.true, strict=True))
        return {"ranked_right": correct / len(self.true)}


_CLASS = "AutoModelForSequenceClassification"

TASKS = (
    RankTask(
        name="rank",
        shapes=(
            FormatSpec(
                "first + second + better",
                build_ranked,
                {"first": ("first",), "second": ("second",), "better": ("better",)},
            ),
        ),
        query_shapes=(
            FormatSpec(
                "first + second", build_unranked, {"first": ("first",), "second": ("second",)}
            ),
        ),
        auto_classes={"encoder": _CLASS, "decoder": _CLASS},
        peft_types={"encoder": "SEQ_CLS", "decoder": "SEQ_CLS"},
        headline="ranked_right",
    ),
)
