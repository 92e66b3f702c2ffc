"""Generate replies to prompts and compute predictions for rows with a loaded model.

The task defines the computation; this module batches rows. Rows are packed without padding if the
model passes a test with packed rows, else padded with rows of similar length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ftlevel.artifacts.row_sinks import partial_of
from ftlevel.config import SPECS
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.fit import truncate_row
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.prepare.inference import QueryRow
from ftlevel.errors import ConfigError, InputError, UnansweredError
from ftlevel.evaluation.decoding import RowDecoder, open_decoder
from ftlevel.fast.likelihoods import supervised_loss
from ftlevel.fast.packing import PackedLayout, using_layout
from ftlevel.fast.plan import plan_forward
from ftlevel.fast.step import FastStep
from ftlevel.methods import METHODS
from ftlevel.models.kinds import max_positions
from ftlevel.tasks.base import OutputOptions, Prediction
from ftlevel.trained.generation import GenerationOptions, cut_at_stop
from ftlevel.trained.model_ref import LoadedModel

T = TypeVar("T")
RowFunction = Callable[[Encoded, torch.Tensor], T]
BatchFunction = Callable[[Sequence[Encoded], torch.Tensor, torch.Tensor], Sequence[T]]

MIN_FAST_ROWS = 64
"""Minimum number of rows for which the checks of the fast step pay off."""

CPU_TOKENS, GPU_TOKENS = 1024, 16_384
"""Maximum tokens per forward pass."""

PADDED_TOKENS = 2_048
"""Maximum positions of a padded batch on a CPU, for models whose rows cannot be packed."""


class RowScorer:
    """Computes logits of encoded rows with a loaded model; `close` restores the model."""

    def __init__(self, trained: LoadedModel, batch_size: int | None) -> None:
        self._trained = trained
        self._batch_size = batch_size
        self._fast: FastStep | None = None
        self._pad_id = trained.tokenizer.pad_token_id or 0
        self._collate = Collator(self._pad_id)

    def close(self) -> None:
        """Restore the model's own forward pass."""
        if self._fast is not None:
            self._fast.remove()
            self._fast = None

    def __call__(self, rows: Sequence[Encoded], function: RowFunction[T]) -> list[T]:
        """Returns `function(row, logits)` for each row, in order; call it under `torch.no_grad`."""
        return self._apply(
            rows,
            lambda chosen: [
                function(row, logits)
                for row, logits in zip(chosen, self._forward(chosen), strict=True)
            ],
        )

    def score_batches(self, rows: Sequence[Encoded], function: BatchFunction[T]) -> list[T]:
        """Call `function(rows, logits, mask)` per forward pass; return its results, one per row."""
        return self._apply(rows, lambda chosen: function(chosen, *self._states(chosen)))

    def _apply(
        self, rows: Sequence[Encoded], compute: Callable[[list[Encoded]], Sequence[T]]
    ) -> list[T]:
        """Call `compute` on the rows of each forward pass; return the results in row order."""
        if self._fast is None and len(rows) >= MIN_FAST_ROWS:
            self._fast = self._create_fast_step(rows)
        results: list[Any] = [None] * len(rows)
        for part in self._split([len(row.input_ids) for row in rows]):
            for i, result in zip(part, compute([rows[i] for i in part]), strict=True):
                results[i] = result
        return results

    def _create_fast_step(self, rows: Sequence[Encoded]) -> FastStep:
        trained = self._trained
        budget = CPU_TOKENS if trained.device == "cpu" else GPU_TOKENS
        plan = plan_forward(
            trained.model,
            trained.kind,
            trained.ref.card.method,
            trained.objective,
            trained.device,
            budget,
        )
        fast = FastStep(trained.model, plan)
        args = (rows, self._pad_id, trained.device, trained.dtype)
        fast.check(*args)
        fast.check_cross_entropy(trained.objective, *args)
        fast.prune_last_layer(trained.objective, *args)
        return fast

    @property
    def _is_packed(self) -> bool:
        return self._fast is not None and self._fast.plan.packs

    def _split(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        on_cpu = self._trained.device == "cpu"
        limit = (CPU_TOKENS if self._is_packed else PADDED_TOKENS) if on_cpu else GPU_TOKENS
        batch: list[int] = []
        tokens = 0
        for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            size = lengths[row] if self._is_packed or not batch else lengths[batch[0]]
            if batch and (tokens + size > limit or len(batch) == self._batch_size):
                yield batch
                batch, tokens, size = [], 0, lengths[row]
            batch.append(row)
            tokens += size
        if batch:
            yield batch

    def _states(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        batch, layout = self._batch(rows)
        with using_layout(layout):
            return self._trained.logits(batch), batch["attention_mask"]

    def _batch(
        self, rows: Sequence[Encoded]
    ) -> tuple[dict[str, torch.Tensor], PackedLayout | None]:
        """Returns the padded batch of `rows`, and its packed layout; None if it is not packed."""
        trained, batch = self._trained, self._collate(rows)
        layout = None
        if self._is_packed and self._fast is not None:
            layout = PackedLayout.from_mask(batch["attention_mask"])
            layout = replace(layout, is_for_answers=True).pad_to(self._fast.plan.token_multiple)
            if self._fast.plan.needed_tokens is not None:
                layout = layout.with_needed_tokens(self._fast.plan.needed_tokens(batch))
            layout = layout.to(trained.device)
        return {name: value.to(trained.device) for name, value in batch.items()}, layout

    def _forward(self, rows: Sequence[Encoded]) -> Iterator[torch.Tensor]:
        trained, objective = self._trained, self._trained.objective
        batch, layout = self._batch(rows)
        with using_layout(layout):
            if objective.predicts_tokens:
                yield from self._token_logits(batch, rows)
                return
            logits = trained.logits(batch)
        if objective.per_row:
            yield from logits
            return
        num_virtual = logits.shape[1] - batch["input_ids"].shape[1]
        for row, scores in zip(rows, logits, strict=True):
            yield scores[num_virtual : num_virtual + len(row.input_ids)]

    def _token_logits(
        self, batch: dict[str, torch.Tensor], rows: Sequence[Encoded]
    ) -> Iterator[torch.Tensor]:
        """Yields for each row the logits at its labels, `(labeled tokens, vocabulary)`."""
        objective = self._trained.objective
        seen: list[torch.Tensor] = []
        head = self._fast.cross_entropy if self._fast is not None else None
        if head is not None:
            supervised_loss(
                head, self._trained.model, objective, batch, lambda scores, _: seen.append(scores)
            )
        else:
            _, labels = objective.split(batch)
            seen.append(objective.targets(self._trained.logits(batch), labels)[0])
        num_targets = [row.supervised for row in rows]
        yield from torch.cat(seen).split(num_targets)  # type: ignore[no-untyped-call]


PROMPTS = 8
"""Default number of prompts per forward pass."""


@dataclass(frozen=True)
class AnswerRequest:
    """Prompts and rows (`questions`) to predict; `locations` has file and line of each row."""

    prompts: Sequence[str]
    context: str | None
    writing: GenerationOptions
    batch_size: int
    questions: Sequence[Any] = ()
    locations: Sequence[str] = ()


def predict_inputs(trained: LoadedModel, request: AnswerRequest) -> list[Prediction]:
    """Returns the predictions for all prompts, then all rows; call it under `torch.no_grad`.

    Raises ConfigError for a missing or unsupported context, and InputError for a prompt or row
    without a prediction, e.g. without a mask token or too long.
    """
    task = trained.task
    if request.prompts and task.needs_context and request.context is None:
        raise ConfigError(f"{task.name} looks for an answer in a text. Add --context TEXT.")
    if request.context is not None and not task.needs_context:
        raise ConfigError(f"--context belongs to question answering, and this is {task.name}.")
    model = InferenceModel(trained, request.writing, request.batch_size)
    try:
        replies = (
            task.predict_prompts(model, request.prompts, request.context) if request.prompts else []
        )
        answers, refused = predict_rows(model, request.questions, OutputOptions())
        if refused:
            raise InputError(
                [f"{request.locations[i]}: {message}." for i, message in refused.items()]
            )
        return [*replies, *(reply for reply in answers if reply is not None)]
    except UnansweredError as error:
        raise InputError(
            [f"--prompt {i + 1}: {reason}." for i, reason in error.reasons.items()]
        ) from None
    finally:
        model.close()


def predict_rows(
    model: InferenceModel, questions: Sequence[Any], output_options: OutputOptions
) -> tuple[list[Prediction | None], dict[int, str]]:
    """Returns each row's prediction, or None; and the indices of rows without one with reasons."""
    replies: list[Prediction | None] = [None] * len(questions)
    refused: dict[int, str] = {}
    remaining = list(range(len(questions)))
    while remaining:
        batch = [replace(questions[i], row=number) for number, i in enumerate(remaining)]
        try:
            answers = model.task.predict(model, batch, output_options)
        except UnansweredError as error:
            refused |= {remaining[number]: reason for number, reason in error.reasons.items()}
            remaining = [i for i in remaining if i not in refused]
            continue
        for i, reply in zip(remaining, answers, strict=True):
            replies[i] = reply
        break
    return replies, refused


class InferenceModel:
    """Wrapper of a loaded model for predictions by tasks; `close` restores the model.

    `truncate` allows long rows to be truncated; `shortened` counts them. `batch_size` is the
    maximum number of rows of a forward pass; None limits only its tokens.
    """

    def __init__(
        self,
        trained: LoadedModel,
        writing: GenerationOptions,
        batch_size: int | None,
        *,
        truncate: bool = False,
    ) -> None:
        self._trained = trained
        self._writing = replace(writing, stop_texts=trained.task.stop_texts)
        self._batch_size, self._truncate = batch_size, truncate
        self._scorer = RowScorer(trained, batch_size)
        self._decoder: RowDecoder | Literal[False] | None = None  # False: unsupported
        limits = (_text_positions(trained.model, trained.ref.card.method), trained.task.max_tokens)
        self._positions = min((limit for limit in limits if limit is not None), default=None)
        self.shortened = 0
        self.task = trained.task
        self.tokenizer = trained.tokenizer
        self.kind = trained.kind
        self.labels: Sequence[str] = trained.ref.labels
        self.options = trained.ref.options
        self.max_length = trained.ref.card.max_length
        self.prompt_format = trained.ref.prompt_format

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Disable gradients inside the `with` block; then `close`."""
        try:
            with self._trained.inference():
                yield
        finally:
            self.close()

    def close(self) -> None:
        """Restore the model's own forward pass and attention."""
        self._scorer.close()
        if self._decoder:
            self._decoder.close()
            self._decoder = None

    def write(self, prompts: Sequence[list[int]]) -> list[str]:
        """Returns the generated text for each prompt."""
        prompts = self._truncate_prompts(prompts)
        trained, size = self._trained, self._batch_size or PROMPTS
        if self._decoder is None and len(prompts) > size and self._writing.is_greedy:
            self._decoder = open_decoder(trained, prompts)
        if not self._decoder:
            return trained.generate(prompts, self._writing, size)
        texts = self._decoder(prompts, self._writing.max_new_tokens, size)
        decoded = trained.tokenizer.batch_decode(texts, skip_special_tokens=True)
        return [cut_at_stop(str(text), self._writing.stop_texts).strip() for text in decoded]

    def _truncate_prompts(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Returns `prompts`; too long ones keep first and last tokens, or raise UnansweredError."""
        if self._positions is None:
            return list(prompts)
        new = 0 if self.kind == "encoder-decoder" else self._writing.max_new_tokens
        max_length = self._positions - new
        too_long = {i: len(ids) for i, ids in enumerate(prompts) if len(ids) > max_length}
        if too_long and not (self._truncate and max_length > 1):
            suffix = f" with --max-new-tokens {new:,}" if new else ""
            raise UnansweredError(
                {
                    i: f"has {length:,} tokens, and the model allows {max(max_length, 0):,}{suffix}"
                    for i, length in too_long.items()
                }
            )
        self.shortened += len(too_long)
        return [
            ids[:1] + ids[1 - max_length :] if i in too_long else ids
            for i, ids in enumerate(prompts)
        ]

    def score(
        self, rows: Sequence[Encoded], function: Callable[[Encoded, torch.Tensor], T]
    ) -> list[T]:
        """Returns `function(row, logits)` per row; UnansweredError if a row is too long."""
        return self._scorer(self.fit_rows(rows), function)

    def score_batches(self, rows: Sequence[Encoded], function: BatchFunction[T]) -> list[T]:
        """Call `function(rows, logits, mask)` per forward pass; return its results, one per row."""
        return self._scorer.score_batches(self.fit_rows(rows), function)

    def fit_rows(self, rows: Sequence[Encoded]) -> Sequence[Encoded]:
        """Returns `rows`, too long ones truncated; raises UnansweredError if not allowed."""
        positions = self._positions
        if positions is not None:
            too_long = [row for row in rows if row.length > positions]
            if refused := {
                row.row: f"has {row.length:,} tokens, and the model allows {positions:,}"
                + ("" if isinstance(row.labels, list) else " (--overlong truncate cuts it)")
                for row in too_long
                if not self._truncate or isinstance(row.labels, list)  # one label per token
            }:
                raise UnansweredError(refused)
            self.shortened += len(too_long)
            rows = [truncate_row(row, positions) for row in rows] if too_long else rows
        return rows


def _text_positions(model: Any, method: str) -> int | None:
    """Returns the number of positions for text, without virtual tokens; None if unlimited."""
    positions = max_positions(model.config)
    if positions is None:
        return None
    is_soft_prompt = method in METHODS and METHODS[method].positions(SPECS[method]()) > 0
    sizes = [
        adapter.num_virtual_tokens
        for adapter in getattr(model, "peft_config", {}).values()
        if is_soft_prompt or adapter.is_prompt_learning
    ]
    return positions - max(sizes, default=0)


MAX_SHOWN = 5
"""Maximum number of unanswered rows listed in a message; the others are counted."""


@dataclass
class RowCounts:
    """Numbers of rows processed so far, for messages.

    `kept` rows were already in `output`; `answered` rows were processed since, and `skipped` of
    these have no prediction. `shortened` rows were truncated. `seconds` excludes loading the model.
    """

    output: Path | None
    kept: int
    answered: int = 0
    skipped: int = 0
    shown: list[str] = field(default_factory=list)
    shortened: int = 0
    seconds: float = 0.0

    def skip(self, window: Sequence[QueryRow], faults: Mapping[int, str]) -> None:
        """Count rows of `window` without a prediction; `faults` maps their indices to reasons."""
        self.skipped += len(faults)
        self.shown += [f"{window[i].location}: {faults[i]}" for i in sorted(faults)]
        del self.shown[MAX_SHOWN:]

    def format_failures(self, window: Sequence[QueryRow], faults: Mapping[int, str]) -> list[str]:
        """Returns error messages for the first rows without a prediction; see `skip`."""
        lines = [f"{window[i].location}: {faults[i]}." for i in sorted(faults)]
        suffix = f" and {len(lines) - MAX_SHOWN:,} more" if len(lines) > MAX_SHOWN else ""
        rows = "It" if len(lines) == 1 else f"These{suffix}"
        progress = self._format_progress()
        lines = lines[:MAX_SHOWN]
        lines[-1] += (
            f" {rows} cannot be answered. Correct them, or leave their answers empty by "
            f"--on-bad-row skip.{' ' if progress else ''}{progress}"
        )
        return lines

    def format_stop_message(self) -> str:
        """Returns the message for an interruption by the user."""
        return f"interrupted; {self._format_progress() or 'nothing was saved.'}"

    def _format_progress(self) -> str:
        num_rows = self.kept + self.answered
        if self.output is None or not num_rows:
            return ""
        return f"{num_rows:,} rows are in {partial_of(self.output)}: --resume continues with them."

    def warnings(self) -> Iterator[str]:
        """Yields the warnings to print at the end of the command."""
        if self.skipped:
            more = "; …" if self.skipped > len(self.shown) else ""
            yield (
                f"{self.skipped:,} of {self.answered:,} rows have no answer "
                f"({'; '.join(self.shown)}{more})"
            )
        if self.shortened:
            yield f"{self.shortened:,} rows were shortened to the model's maximum length"
