"""Extractive question answering: windows of a context, best spans, and SQuAD's EM and F1.

Metrics are those of the official scripts of SQuAD v1.1 (Rajpurkar et al., 2016) and v2.0 (2018, for
unanswerable questions).
"""

from __future__ import annotations

import math
import re
import statistics
import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import Encoded, RowError
from ftlevel.data.encoding.spans import DEFAULT_WINDOW_LENGTH, Window, encode_questions
from ftlevel.data.formats.detect import Format, FormatSpec, RoleValues
from ftlevel.data.formats.examples import Question, create_question
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError, UnansweredError
from ftlevel.objectives import Checks, Meter, Objective
from ftlevel.tasks.base import (
    BaseTask,
    Column,
    OutputOptions,
    Prediction,
    PromptedModel,
    TokenDecoder,
    check_options,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ftlevel.data.encoding.fit import FittedRows
    from ftlevel.data.gate.checks import Mask
    from ftlevel.data.prepare.encoder import Encoder
    from ftlevel.data.prepare.loading import LoadedData
    from ftlevel.models.sources import ModelSource


MAX_SPAN_TOKENS = 30
_PUNCTUATION = frozenset(string.punctuation)


@dataclass
class BestSpan:
    """Best span so far over the windows of one question: characters `[start, end)` of the context.

    `score` is the sum of start and end logit; `null` is the lowest "no answer" score of a window.
    """

    text: str = ""
    score: float = -math.inf
    null: float = math.inf
    start: int = 0
    end: int = 0

    def answer(self, *, unanswerable: bool) -> str:
        """Returns the text; "" if `unanswerable` and "no answer" has the higher score."""
        return "" if unanswerable and self.null > self.score else self.text


def update_span(best_span: BestSpan, scores: Tensor, window: Any) -> None:
    """Update `best_span` (modified) by a window's start and end logits `scores` `(seq, 2)`."""
    offset = window.context_start
    count = len(window.offsets)
    start = scores[offset : offset + count, 0].float()
    end = scores[offset : offset + count, 1].float()
    spans = start[:, None] + end[None, :]
    allowed = spans.new_ones(spans.shape).triu().tril(MAX_SPAN_TOKENS - 1).bool()
    spans = spans.masked_fill(~allowed, -math.inf)
    first, last = divmod(int(spans.argmax()), count)
    score = float(spans[first, last])
    if score > best_span.score:
        best_span.score = score
        offset, end = window.offsets[first][0], window.offsets[last][1]
        text = window.context[offset:end]
        best_span.text = text.strip()
        best_span.start = offset + len(text) - len(text.lstrip())
        best_span.end = best_span.start + len(best_span.text)
    best_span.null = min(best_span.null, float(scores[0].float().sum()))


def merge_spans(best_span: BestSpan, other: BestSpan) -> None:
    """Update `best_span` (modified) with the best span of other windows."""
    if other.score > best_span.score:
        best_span.score, best_span.text = other.score, other.text
        best_span.start, best_span.end = other.start, other.end
    best_span.null = min(best_span.null, other.null)


def normalize_answer(text: str) -> str:
    """Returns `text` lowercased, without punctuation, articles and repeated whitespace."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if the normalized prediction equals one of `answers` ("" if none), else 0.0."""
    return float(any(normalize_answer(prediction) == normalize_answer(a) for a in answers or ("",)))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the highest word F1 of the prediction and one of `answers` ("" if there are none)."""
    return max(_f1(prediction, answer) for answer in answers or ("",))


def _f1(prediction: str, answer: str) -> float:
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


NO_ANSWER = "(no answer)"


@dataclass(frozen=True)
class SpanTask(BaseTask):
    """Task whose target is a span of a context."""

    has_new_head: ClassVar[bool] = True
    needs_offsets: ClassVar[bool] = True
    needs_context: ClassVar[bool] = True
    # Questions on the same context legitimately share most tokens.
    checks: ClassVar[Checks] = Checks(near_duplicates=False)
    split_text: ClassVar[str] = "more windows than questions"

    def synthetic_row(self, ids: list[int], row: int) -> Encoded:
        return Encoded(ids, (0, min(1, len(ids) - 1)), row)

    def create_objective(self, kind: str, data_info: Mapping[str, Any]) -> Objective:
        return Spans(self.headline, unanswerable=data_info.get("unanswerable", False))

    def inference_config(self, config: DataConfig, data_info: Mapping[str, Any]) -> dict[str, Any]:
        return {"doc_stride": config.doc_stride, "unanswerable": data_info["unanswerable"]}

    def card_defaults(
        self, source: ModelSource, model_config: Any, tokenizer: Any, kind: str
    ) -> dict[str, Any]:
        return {"options": {"doc_stride": 128, "unanswerable": False}}

    def encode(self, encoder: Encoder, examples: Sequence[Any], table: Table) -> FittedRows:
        from ftlevel.data.encoding.fit import FittedRows

        config = encoder.config
        length = encoder.limit(DEFAULT_WINDOW_LENGTH) or DEFAULT_WINDOW_LENGTH
        windows, dropped = encode_questions(
            encoder.tokenizer,
            examples,
            length=length,
            stride=config.doc_stride,
            separator=_separator(encoder.kind),
            where=table.where,
            drop=encoder.lenient or config.overlong == "drop",
        )
        queries = len({window.row for window in windows})
        is_set = isinstance(config.max_length, int)
        return FittedRows(
            windows,
            length,
            "" if is_set else "auto: windows as in SQuAD's baselines, within the model's positions",
            dropped=dropped,
            split=len(windows) - queries,
            overlong=config.overlong,
        )

    def check_rows(self, rows: Sequence[Encoded]) -> Mapping[str, Mask]:
        """Returns `answer_cut` -> mask of windows; True if no window has the whole answer."""
        import numpy as np

        has_span = {row.row for row in rows if row.labels != (0, 0)}
        cut = (
            isinstance(row, Window) and bool(row.answers) and row.row not in has_span
            for row in rows
        )
        return {"answer_cut": np.fromiter(cut, dtype=bool, count=len(rows))}

    def data_info(self, loaded: LoadedData) -> Mapping[str, Any]:
        """Returns `unanswerable`: whether some training questions have no answer."""
        return {"unanswerable": any(not question.answers for question in loaded.train)}

    def describe_rows(self, loaded: LoadedData, data_info: Mapping[str, Any]) -> list[Choice]:
        none = sum(not question.answers for question in loaded.train)
        note = f"{none:,} without an answer" if none else "each has an answer"
        return [Choice("questions", f"{len(loaded.train):,}", note)]

    def prediction_columns(
        self,
        format_: Format,
        labels: Sequence[str],
        inference_config: Mapping[str, Any],
        outputs: OutputOptions,
    ) -> dict[str, Column]:
        check_options(outputs, f"--task {self.name}", "Every span comes with a score.")
        return {"": "text", "start": "whole", "end": "whole", "score": "number"}

    def create_query(self, prompt: str, context: str | None, number: int) -> Any:
        return Question(context or "", prompt, (), number)

    def predict(
        self, model: PromptedModel, queries: Sequence[Any], outputs: OutputOptions
    ) -> list[Prediction]:
        """Returns the best span for each question, "" for no answer."""
        windows = _encode_windows(model, queries)
        spans = [BestSpan() for _ in queries]

        def read(window: Encoded, logits: Tensor) -> BestSpan:
            best = BestSpan()
            update_span(best, logits.cpu(), window)
            return best

        for window, best in zip(windows, model.score(windows, read), strict=True):
            merge_spans(spans[window.row], best)
        return [_parse_span(best, unanswerable=model.options["unanswerable"]) for best in spans]

    def dummy_labels(self, ids: Sequence[int], labels: Sequence[str], inference_config: Any) -> Any:
        return (1, 2)

    def decode_targets(
        self, row: Encoded, names: Sequence[str], kind: str, decoder: TokenDecoder
    ) -> list[str | None]:
        """Returns "" for the tokens of the answer, else None."""
        first, last = row.labels if isinstance(row.labels, tuple) else (0, 0)
        return ["" if last and first <= i <= last else None for i in range(len(row.input_ids))]

    def decode_label(self, row: Encoded, names: Sequence[str]) -> str:
        """Returns a note if this window does not contain the answer."""
        return "" if row.labels != (0, 0) else "no answer in this window"


def _encode_windows(model: PromptedModel, queries: Sequence[Question]) -> list[Encoded]:
    length = model.max_length or DEFAULT_WINDOW_LENGTH
    try:
        windows, dropped = encode_questions(
            model.tokenizer,
            queries,
            length=length,
            stride=model.options["doc_stride"],
            separator=_separator(model.kind),
            where=str,
            drop=True,
        )
    except RowError as error:
        raise UnansweredError({error.row: error.message.rstrip(".")}) from None
    except InputError:  # no question fits
        windows, dropped = [], len(queries)
    if dropped:
        encoded = {window.row for window in windows}
        message = f"the question leaves no room for its context in windows of {length:,} tokens"
        raise UnansweredError({q.row: message for q in queries if q.row not in encoded})
    return windows


def _parse_span(best: BestSpan, *, unanswerable: bool) -> Prediction:
    text = best.answer(unanswerable=unanswerable)
    start, end = (best.start, best.end) if text else (None, None)
    score = best.score if text else best.null
    columns = {"": text, "start": start, "end": end, "score": score}
    return Prediction(text or NO_ANSWER, columns=columns)


def create_unanswered(values: RoleValues) -> Question:
    """Create an example of a question and its context, without an answer."""
    return Question(values.text("context"), values.text("question"), (), values.index)


def _separator(kind: str) -> str:
    return "\n" if kind == "decoder" else ""


@dataclass(frozen=True)
class Spans(Objective):
    """Objective: cross entropy of start and end, logits `(batch, seq, 2)`, labels `(batch, 2)`.

    Padding is masked, unlike in transformers, so a row's loss does not depend on its batch.
    """

    unanswerable: bool = False
    metric_names: ClassVar[tuple[str, ...]] = ("exact_match", "f1")

    def logits(self, outputs: Any) -> Tensor:
        import torch

        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)

    def choices(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns start and end logits `(2 · batch, seq)` with padding masked."""
        return logits.masked_fill(mask[..., None] == 0, -1e4).transpose(1, 2).flatten(0, 1)

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns the sum of the negative log-likelihoods of starts and ends, in nats."""
        import torch
        from torch.nn import functional

        scores = logits.float().masked_fill(mask[..., None] == 0, torch.finfo(torch.float32).min)
        return functional.cross_entropy(scores, labels, reduction="sum")

    def meter(self) -> Meter:
        return SpanMeter(self.unanswerable)

    def guess_loss(self, rows: Sequence[Encoded]) -> float | None:
        """Returns the loss of a uniform distribution over the tokens of each row."""
        return statistics.fmean(math.log(len(row.input_ids)) for row in rows) if rows else None


class SpanMeter:
    """Meter of SQuAD's exact match and F1, 0 to 1, of the best span of each question."""

    def __init__(self, unanswerable: bool) -> None:
        self.unanswerable = unanswerable
        self.spans: defaultdict[int, BestSpan] = defaultdict(BestSpan)
        self.answers: dict[int, list[str]] = {}

    def update(self, logits: Tensor, labels: Tensor, rows: Sequence[Any]) -> None:
        for scores, window in zip(logits.cpu(), rows, strict=True):
            update_span(self.spans[window.row], scores, window)
            self.answers[window.row] = [text for text, _ in window.answers]

    def compute(self, loss: float) -> dict[str, float]:
        predictions = {
            row: span.answer(unanswerable=self.unanswerable) for row, span in self.spans.items()
        }
        count = len(predictions)
        return {
            "exact_match": sum(exact_match(t, self.answers[r]) for r, t in predictions.items())
            / count,
            "f1": sum(f1(t, self.answers[r]) for r, t in predictions.items()) / count,
        }

    def merge(self, other: SpanMeter) -> None:
        for row, span in other.spans.items():
            merge_spans(self.spans[row], span)
        self.answers |= other.answers

    def pool(self, meters: Sequence[SpanMeter]) -> SpanMeter:
        """Returns a meter of the questions of all `meters`; repeated questions count repeatedly."""
        pooled = SpanMeter(self.unanswerable)
        for meter in meters:
            for row, span in meter.spans.items():
                pooled.answers[len(pooled.spans)] = meter.answers[row]
                pooled.spans[len(pooled.spans)] = span
        return pooled

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        ((row, span),) = self.spans.items()
        return {"predicted": span.answer(unanswerable=self.unanswerable), "true": self.answers[row]}


_CLASS = "AutoModelForQuestionAnswering"

TASKS = (
    SpanTask(
        name="question-answering",
        shapes=(
            FormatSpec(
                "context + question + answers",
                create_question,
                {"context": ("context",), "question": ("question",), "answers": ("answers",)},
                {"id": ("id",)},
            ),
        ),
        query_shapes=(
            FormatSpec(
                "context + question",
                create_unanswered,
                {"context": ("context",), "question": ("question",)},
            ),
        ),
        auto_classes={"encoder": _CLASS, "decoder": _CLASS, "encoder-decoder": _CLASS},
        peft_types=dict.fromkeys(("encoder", "decoder", "encoder-decoder"), "QUESTION_ANS"),
        headline="f1",
    ),
)
