"""Score a model on encoded rows, in `train` and in `evaluate`, and return results per row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.evaluation.intervals import ExampleRecord, ExampleStats, select_metrics
from ftlevel.fast.cross_entropy import Observe
from ftlevel.fast.likelihoods import supervised_loss
from ftlevel.fast.step import chunked_cross_entropy
from ftlevel.models.hardware import evaluating
from ftlevel.objectives import Meter, Objective, ScoreTexts, TokenObjective
from ftlevel.trained.generation import (
    Divide,
    GenerationOptions,
    batches,
    compute_all,
    generate_texts,
)
from ftlevel.trained.model_ref import LoadedModel


@dataclass(frozen=True)
class Evaluator:
    """Callable that evaluates a model on fixed rows.

    Attributes:
        generated_rows: number of rows, from the first, for which texts are generated.
        language: ISO 639-1 code of the texts; "" if unknown.
        metrics: names of the metrics to return besides the loss; empty for all.
        corpus: documents that queries search; empty for those of the rows.
        begin_record: creates a record if a call has none.
        divide: divides batches among processes, all of which evaluate and get the same metrics.
    """

    rows: Sequence[Encoded]
    tokenizer: Any
    kind: str
    objective: Objective
    device: str
    dtype: str
    batch_size: int
    generated_rows: int = 0
    writing: GenerationOptions = field(default_factory=lambda: GenerationOptions(64))
    score_texts: ScoreTexts | None = None
    language: str = ""
    chunked_cross_entropy: bool = True
    metrics: Sequence[str] = ()
    corpus: Sequence[Encoded] = ()
    begin_record: Callable[[], ExampleRecord | None] = lambda: None
    divide: Divide = compute_all

    @property
    def pad_id(self) -> int:
        """Padding token of batches."""
        return self.tokenizer.pad_token_id or 0

    def with_model(self, model: LoadedModel) -> Evaluator:
        """Returns a copy for another model than that of training or `evaluate`."""
        return replace(self, dtype=model.dtype)

    # ruff: disable[ARG002] - for subclasses
    def for_other(self, model: LoadedModel, encode: Callable[[], Any]) -> Evaluator:
        """Returns a copy for another model that generates no texts; `encode` encodes its rows."""
        return replace(self.with_model(model), generated_rows=0, score_texts=None, language="")

    def get_result_texts(self, row: Encoded, line: dict[str, Any]) -> dict[str, str]:
        """Returns name → decoded text of `row` that depends on its results, `line`."""
        return {}

    # ruff: enable[ARG002]

    def get_warnings(self) -> Sequence[str]:
        """Returns warnings about the evaluations so far."""
        return ()

    def __call__(self, model: Any, record: ExampleRecord | None = None) -> dict[str, float]:
        """Evaluate `model` in eval mode; return the metrics and add examples to `record`."""
        record = record or self.begin_record()
        with evaluating(model, self.device, self.dtype):
            metrics = self.score(model, record)
            if self.generated_rows and self.score_texts is not None:
                texts = self.generate(model)
                references = [self.answer_text(row) for row in self._generated()]
                metrics |= self.score_texts(texts, references, self.language)
                if record is not None:
                    record.add_texts(self._generated(), texts, references)
        return select_metrics(metrics, self.metrics)

    def score(self, model: Any, record: ExampleRecord | None) -> dict[str, float]:
        """Returns loss and metrics of `model`, which is in eval mode; adds rows to `record`."""
        objective = self.objective
        pad_id = self.pad_id
        collate = Collator(pad_id)
        by_length = sorted(self.rows, key=lambda row: len(row.input_ids), reverse=True)
        chunked = objective if self.chunked_cross_entropy else None
        with chunked_cross_entropy(
            model, chunked, by_length, pad_id, self.device, self.dtype
        ) as head:

            def score(rows: Sequence[Encoded]) -> BatchScores:
                batch = {k: v.to(self.device) for k, v in collate(rows).items()}
                scores = BatchScores(objective, record)
                stats = scores.stats
                stats.targets = int(objective.count(batch["labels"]))
                if head is not None:
                    observe = self._observer(stats.meter, scores.record, rows, batch["labels"])
                    stats.loss = supervised_loss(head, model, objective, batch, observe).item()
                    return scores
                inputs, labels = objective.split(batch)
                logits = objective.logits(model(**inputs))
                stats.loss = objective.loss_sum(logits, labels, batch["attention_mask"]).item()
                stats.meter.update(*objective.targets(logits, labels), rows)
                if scores.record is not None:
                    scores.record.add(rows, logits, labels, batch["attention_mask"])
                return scores

            parts = self.divide(
                lambda own: [score(rows) for rows in own],
                list(batches(by_length, self.batch_size)),
            )
        return merge_scores(objective, parts, record)

    def _observer(
        self,
        meter: Meter,
        record: ExampleRecord | None,
        rows: Sequence[Encoded],
        labels: torch.Tensor,
    ) -> Observe:
        """Returns a callback that adds chunks of logits and targets to `meter` and `record`."""
        located = self.objective.locate(labels) if record is not None else None
        row_indices = located[0] // labels.shape[1] if located is not None else None
        seen = 0

        def observe(scores: torch.Tensor, targets: torch.Tensor) -> None:
            nonlocal seen
            meter.update(scores, targets, rows)
            if record is not None and row_indices is not None:
                record.add_targets(rows, row_indices[seen : seen + len(targets)], scores, targets)
            seen += len(targets)

        return observe

    def _generated(self) -> Sequence[Encoded]:
        return [row.sequences[0] for row in self.rows[: self.generated_rows]]

    def generate(self, model: Any) -> list[str]:
        """Returns the generated texts for the first `generated_rows` rows."""
        prompts = [self._prompt(row) for row in self._generated()]
        with torch.random.fork_rng(enabled=bool(self.writing.temperature)):
            return generate_texts(
                model,
                self.tokenizer,
                prompts,
                self.device,
                self.batch_size,
                self.writing,
                self.divide,
            )

    def _prompt(self, row: Encoded) -> list[int]:
        if self.kind == "encoder-decoder" or not isinstance(row.labels, list):
            return row.input_ids
        return row.input_ids[: self._answer_start(row.labels)]

    def prompt_text(self, row: Encoded) -> str:
        """Returns the decoded text before the last answer of `row`."""
        return self.decode(self._prompt(row))

    def text(self, row: Encoded) -> str:
        """Returns the decoded input of `row`."""
        return self.decode(row.input_ids)

    def get_texts(self, row: Encoded) -> dict[str, str]:
        """Returns name, such as `input` → decoded text of `row`."""
        has_targets = isinstance(self.objective, TokenObjective) and self.kind != "encoder"
        is_prompt = self.objective.samples  # its sequences are made up
        first, *others = [row] if is_prompt else row.sequences
        target = self.answer_text(first) if has_targets or others else ""
        texts = {"input": self.prompt_text(first) if target else self.text(first)}
        if len(others) == 1:
            base_text = self.answer_text(others[0]) or self.text(others[0])
            return {"chosen": target or texts["input"], "rejected": base_text} | (
                {"input": texts["input"]} if target else {}
            )
        return {**texts, "true": target} if target else texts

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids` without special tokens other than masks."""
        mask = getattr(self.tokenizer, "mask_token_id", None)
        if mask is None or mask not in ids:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        hidden = {*self.tokenizer.all_special_ids} - {mask}
        return str(self.tokenizer.decode([i for i in ids if i not in hidden])).strip()

    def answer_text(self, row: Encoded) -> str:
        """Returns the decoded last answer of `row`; empty if the labels are not tokens."""
        labels = row.labels if isinstance(row.labels, list) else []
        if self.kind != "encoder-decoder":
            labels = labels[self._answer_start(labels) :]
        return self.decode([label for label in labels if label != IGNORED])

    @staticmethod
    def _answer_start(labels: list[int]) -> int:
        end = len(labels)
        while end and labels[end - 1] == IGNORED:
            end -= 1
        start = end
        while start and labels[start - 1] != IGNORED:
            start -= 1
        return start


class BatchScores:
    """Statistics of a batch; with `record`, that of the evaluation, also a record of its rows."""

    def __init__(self, objective: Objective, record: ExampleRecord | None) -> None:
        self.stats = ExampleStats(objective.meter())
        self.record = ExampleRecord(objective) if record is not None else None


def merge_scores(
    objective: Objective, parts: Sequence[BatchScores], record: ExampleRecord | None
) -> dict[str, float]:
    """Returns loss and metrics of the batches `parts`; adds their rows to `record`, if any."""
    total = ExampleStats(objective.meter())
    for part in parts:
        total.merge(part.stats)
        if record is not None and part.record is not None:
            record.merge(part.record)
    loss = total.loss / total.targets if total.targets else math.nan
    return {"loss": loss, **total.meter.compute(loss)}


MAX_TEXT_LENGTH = 2_000
"""Characters of a text in the results."""


def iterate_results(
    record: ExampleRecord,
    labels: Sequence[str],
    get_position: Callable[[int], str],
    *,
    base: ExampleRecord | None,
    evaluator: Evaluator | None,
) -> Iterator[dict[str, Any]]:
    """Yields the results of each example in `record` as a dictionary, in row order.

    `get_position` returns file and line of a row by its index. `base` adds another model's results
    for the same rows, and `evaluator` the texts of the rows.
    """
    rows = () if evaluator is None else evaluator.rows
    by_row = {row.row: row for row in reversed(rows)}  # the first of the windows of a row
    generated = {item.row: item for item in record.written}
    base_generated = {item.row: item for item in base.written} if base else {}
    for row in sorted(record.units):
        unit = record.units[row]
        line: dict[str, Any] = {"row": row, "where": get_position(row)}
        line["loss"] = record.row_loss(row)
        if evaluator is not None and row in by_row:
            line |= _shorten(evaluator.get_texts(by_row[row]))
        line |= unit.meter.describe(labels)
        if row in generated:
            line |= {"predicted": generated[row].text, "true": generated[row].reference}
        if base is not None and row in base.units:
            line["base_loss"] = base.row_loss(row)
            base_metrics = base.units[row].meter.describe(labels)
            line |= {f"base_{key}": value for key, value in base_metrics.items() if key != "true"}
            if row in base_generated:
                line["base_predicted"] = base_generated[row].text
        if evaluator is not None and row in by_row:
            line |= _shorten(evaluator.get_result_texts(by_row[row], line))
        yield line


def _shorten(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: text[:MAX_TEXT_LENGTH] for name, text in texts.items()}
