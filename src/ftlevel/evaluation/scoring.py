"""Score a model on encoded rows, in training and in `evaluate`, and export results per row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ftlevel.data.encoding.chat import find_end_of_turn_id
from ftlevel.data.encoding.collate import Collator, pad
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.evaluation.embeddings import score_embeddings
from ftlevel.evaluation.intervals import ExampleRecord, select_metrics
from ftlevel.evaluation.likelihoods import compute_likelihoods, score_answers
from ftlevel.fast.head.cross_entropy import Observe
from ftlevel.fast.head.likelihoods import supervised_loss
from ftlevel.fast.step import chunked_cross_entropy
from ftlevel.models.hardware import autocast
from ftlevel.task import LikelihoodObjective, Meter, Objective, ScoreTexts, TokenObjective
from ftlevel.tasks.embedding.objective import Embeddings
from ftlevel.trained.load import NAMED, LoadedModel, load_ref, resolve_recorded_reference
from ftlevel.trained.model_ref import ModelRef, card_directory, find_base


@dataclass(frozen=True)
class GenerationOptions:
    """Settings of text generation; a `temperature` of 0 does not sample."""

    max_new_tokens: int
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.num_beams == 1 and not self.temperature

    def arguments(self, tokenizer: Any) -> dict[str, Any]:
        """Return the arguments of `generate`; sampling sets torch's global seed."""
        common = {
            "max_new_tokens": self.max_new_tokens,
            "use_cache": True,
            "pad_token_id": tokenizer.pad_token_id or 0,
            "eos_token_id": stop_ids(tokenizer),
        }
        if not self.temperature:
            return common | {"do_sample": False, "num_beams": self.num_beams}
        torch.manual_seed(self.seed)
        # transformers' default of 50 for top_k is switched off.
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return common | {"do_sample": True} | drawn


class EvaluationRecord(Protocol):
    """Receives every row that an evaluator scores."""

    def add(
        self,
        rows: Sequence[Encoded],
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        """Record a scored batch."""

    def add_targets(
        self,
        rows: Sequence[Encoded],
        owners: torch.Tensor,
        scores: torch.Tensor,
        targets: torch.Tensor,
    ) -> None:
        """Record scored tokens of a batch; `owners` are their indices in `rows`."""

    def add_answers(
        self, rows: Sequence[Encoded], answers: torch.Tensor, verdicts: torch.Tensor
    ) -> None:
        """Record whole answers, with the arguments of `LikelihoodObjective.judge`."""

    def add_row(self, row: int, loss: float, targets: int, meter: Meter) -> None:
        """Record an example with its summed loss, its number of targets and its own metrics."""

    def add_texts(
        self, rows: Sequence[Encoded], texts: Sequence[str], references: Sequence[str]
    ) -> None:
        """Record the texts generated for `rows`."""

    def add_samples(self, row: Encoded, values: Any, texts: Sequence[str]) -> None:
        """Record the rewards of a prompt's completions, as `RewardMeter.update` takes them."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models on fixed rows.

    Attributes:
        generated_rows: number of first rows to generate texts for; 0 for none.
        language: ISO 639-1 code of the texts; "" if unknown.
        metrics: names of the metrics to return besides the loss; empty for all.
        begin_record: creates the record for a call without one; may return None.
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
    begin_record: Callable[[], EvaluationRecord | None] = lambda: None

    def __call__(self, model: Any, record: EvaluationRecord | None = None) -> dict[str, float]:
        """Return the metrics of `model`, whose training mode is restored."""
        training, record = model.training, record or self.begin_record()
        model.eval()
        try:
            with torch.no_grad(), autocast(self.device, self.dtype):
                metrics = self._score(model, record)
                if self.generated_rows and self.score_texts is not None:
                    texts = self.generate(model)
                    references = [self.answer_text(row) for row in self._generated()]
                    metrics |= self.score_texts(texts, references, self.language)
                    if record is not None:
                        record.add_texts(self._generated(), texts, references)
        finally:
            model.train(training)
        return select_metrics(metrics, self.metrics)

    def _score(self, model: Any, record: EvaluationRecord | None) -> dict[str, float]:
        objective = self.objective
        if isinstance(objective, LikelihoodObjective):
            return score_answers(self, model, record)
        if isinstance(objective, Embeddings):
            return score_embeddings(self, objective, model, record)
        meter, total, count = objective.meter(), 0.0, 0
        pad_id = self.tokenizer.pad_token_id or 0
        collate = Collator(pad_id)
        by_length = sorted(self.rows, key=lambda row: len(row.input_ids), reverse=True)
        wanted = objective if self.chunked_cross_entropy else None
        with chunked_cross_entropy(
            model, wanted, by_length, pad_id, self.device, self.dtype
        ) as head:
            for rows in batches(by_length, self.batch_size):
                batch = {k: v.to(self.device) for k, v in collate(rows).items()}
                count += int(objective.count(batch["labels"]))
                if head is not None:
                    observe = self._observer(meter, record, rows, batch["labels"])
                    total += supervised_loss(head, model, objective, batch, observe).item()
                    continue
                inputs, labels = objective.split(batch)
                logits = objective.logits(model(**inputs))
                total += objective.loss_sum(logits, labels, batch["attention_mask"]).item()
                meter.update(*objective.targets(logits, labels), rows)
                if record is not None:
                    record.add(rows, logits, labels, batch["attention_mask"])
        loss = total / count if count else math.nan
        return {"loss": loss, **meter.compute(loss)}

    def _observer(
        self,
        meter: Meter,
        record: EvaluationRecord | None,
        rows: Sequence[Encoded],
        labels: torch.Tensor,
    ) -> Observe:
        """Return a callback for the logits and targets of each chunk, in batch order."""
        owners = None
        if record is not None and isinstance(self.objective, TokenObjective):
            owners = self.objective.locate(labels)[0] // labels.shape[1]
        seen = 0

        def observe(scores: torch.Tensor, targets: torch.Tensor) -> None:
            nonlocal seen
            meter.update(scores, targets, rows)
            if record is not None and owners is not None:
                record.add_targets(rows, owners[seen : seen + len(targets)], scores, targets)
            seen += len(targets)

        return observe

    def _generated(self) -> Sequence[Encoded]:
        return [row.branches[0] for row in self.rows[: self.generated_rows]]

    def generate(self, model: Any) -> list[str]:
        """Return the generated texts for the first `generated_rows` rows.

        Sampling restores the random state, which the next training step uses.
        """
        prompts = [self._prompt(row) for row in self._generated()]
        with torch.random.fork_rng(enabled=bool(self.writing.temperature)):
            return generate_texts(
                model, self.tokenizer, prompts, self.device, self.batch_size, self.writing
            )

    def _prompt(self, row: Encoded) -> list[int]:
        """Return the ids before the last answer of `row`."""
        if self.kind == "encoder-decoder" or not isinstance(row.labels, list):
            return row.input_ids
        return row.input_ids[: self._answer_start(row.labels)]

    def prompt_text(self, row: Encoded) -> str:
        """Return the decoded text before the last answer of `row`."""
        return self._in_words(self._prompt(row))

    def text(self, row: Encoded) -> str:
        """Return the decoded input of `row`."""
        return self._in_words(row.input_ids)

    def _in_words(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def answer_text(self, row: Encoded) -> str:
        """Return the decoded last answer of `row`; empty if its labels are not tokens."""
        labels = row.labels if isinstance(row.labels, list) else []
        if self.kind != "encoder-decoder":
            labels = labels[self._answer_start(labels) :]
        ids = [label for label in labels if label != IGNORED]
        return self._in_words(ids)

    @staticmethod
    def _answer_start(labels: list[int]) -> int:
        """Return the index at which the last run of supervised labels starts."""
        end = len(labels)
        while end and labels[end - 1] == IGNORED:
            end -= 1
        start = end
        while start and labels[start - 1] != IGNORED:
            start -= 1
        return start


def batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield slices of `rows` of at most `size` items."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    device: str,
    batch_size: int,
    writing: GenerationOptions,
) -> list[str]:
    """Return the generated text for each prompt, in order and without special tokens.

    Prompts are batched by length. Decoders are padded on the left. Encoder-decoders are padded on
    the right, because padding on the left would shift the positions of models such as BART.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    encoder_decoder = model.config.is_encoder_decoder
    left = not encoder_decoder
    for indices in batches(order, batch_size):
        ids = pad([prompts[i] for i in indices], pad_id, left=left).to(device)
        mask = pad([[1] * len(prompts[i]) for i in indices], 0, left=left).to(device)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **writing.arguments(tokenizer),
        )
        answers = written if encoder_decoder else written[:, ids.shape[1] :]
        for i, answer in zip(indices, answers, strict=True):
            texts[i] = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
    return texts


def stop_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end a text: EOS, and the end of a turn in the chat template."""
    ends = [tokenizer.eos_token_id]
    if getattr(tokenizer, "chat_template", None):
        ends.append(find_end_of_turn_id(tokenizer))
    return list(dict.fromkeys(i for i in ends if i is not None))


_LONGEST = 2_000  # characters of a text


def row_lines(
    record: ExampleRecord,
    labels: Sequence[str],
    where: Callable[[int], str],
    *,
    base: ExampleRecord | None = None,
    evaluator: Evaluator | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the results of each example as a dictionary, in row order.

    `where` returns the source of a row by its index. `base` adds the results of another model on
    the same rows, and `evaluator` the texts of the rows.
    """
    texts = {} if evaluator is None else texts_of(evaluator)
    written = {item.row: item for item in record.written}
    base_written = {item.row: item for item in base.written} if base else {}
    for row in sorted(record.units):
        unit = record.units[row]
        line: dict[str, Any] = {"row": row, "where": where(row)}
        line["loss"] = unit.loss / unit.targets if unit.targets else None
        line |= {**texts.get(row, {}), **unit.meter.describe(labels)}
        if row in written:
            line |= {"predicted": written[row].text, "true": written[row].reference}
        if base is not None and row in base.units:
            other = base.units[row]
            line["base_loss"] = other.loss / other.targets if other.targets else None
            said = other.meter.describe(labels)
            line |= {f"base_{key}": value for key, value in said.items() if key != "true"}
            if row in base_written:
                line["base_predicted"] = base_written[row].text
        yield line


def texts_of(evaluator: Evaluator) -> dict[int, dict[str, str]]:
    """Return row index → input and reference texts, truncated to `_LONGEST` characters."""
    writes = isinstance(evaluator.objective, TokenObjective) and evaluator.kind != "encoder"
    found: dict[int, dict[str, str]] = {}
    for row in evaluator.rows:
        if row.row in found:  # another window or piece of the same row
            continue
        first, *others = row.branches
        answered = evaluator.answer_text(first) if writes or others else ""
        texts = {"input": evaluator.prompt_text(first) if answered else evaluator.text(first)}
        if len(others) == 1:
            other = evaluator.answer_text(others[0]) or evaluator.text(others[0])
            texts = {"chosen": answered or texts["input"], "rejected": other} | (
                {"input": texts["input"]} if answered else {}
            )
        elif answered:
            texts["true"] = answered
        found[row.row] = {name: text[:_LONGEST] for name, text in texts.items()}
    return found


KEPT = "reference"
"""Folder next to an adapter, with the initial adapter or the name of the reference model."""


def needs_reference(evaluator: Evaluator) -> bool:
    """Return whether the objective compares rows with a reference."""
    objective = evaluator.objective
    return isinstance(objective, LikelihoodObjective) and objective.needs_reference


def with_reference(evaluator: Evaluator, trained: LoadedModel, found: ModelRef) -> Evaluator:
    """Return `evaluator` with reference log-probabilities in its rows, if these are needed."""
    if not needs_reference(evaluator):
        return evaluator
    task: Any = trained.task
    reference = _measure(evaluator, trained, found)
    return replace(evaluator, rows=task.with_reference(evaluator.rows, reference))


def _measure(evaluator: Evaluator, trained: LoadedModel, found: ModelRef) -> Any:
    directory = found.directory or Path(found.source.location)
    if (directory / KEPT / NAMED).is_file():
        other = resolve_recorded_reference(directory / KEPT, directory, evaluator.device)
        return _of_another(evaluator, other.in_precision(evaluator.dtype).found)
    if found.directory is not None and (directory / KEPT).is_dir():
        return _of_another(evaluator, replace(found, directory=directory / KEPT))
    if trained.has_adapter:
        with trained.model.disable_adapter():
            return compute_likelihoods(evaluator, trained.model)
    directory = card_directory(directory) or directory
    return _of_another(evaluator, replace(found, source=find_base(found.card, directory)))


def _of_another(evaluator: Evaluator, found: ModelRef) -> Any:
    return compute_likelihoods(evaluator, load_ref(found, evaluator.device).model)
