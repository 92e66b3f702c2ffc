"""How a model of any task answers prompts and rows: the task says what to ask, this runs it.

Score many rows: without padding and without what nobody needs, where the model takes that.

What the fast step does for training serves here: packed rows, the last layer's pruning, and a
language head at the tokens with a label alone. The model is asked first whether it gives the
numbers of padded rows, as in training; where it does not, rows of like length are padded.

What became of the rows that were to be answered, and what is said about it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ftlevel.artifacts.row_sinks import partial_of
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.prepare.inference import AskedRow
from ftlevel.errors import ConfigError, InputError, UnansweredError
from ftlevel.evaluation.decoding import RowDecoder, open_decoder
from ftlevel.evaluation.scoring import Writing, generate_texts
from ftlevel.fast.head.likelihoods import supervised_loss
from ftlevel.fast.packing import PackedLayout, using_layout
from ftlevel.fast.plan import plan_forward
from ftlevel.fast.step import FastStep
from ftlevel.models.hardware import autocast
from ftlevel.models.kinds import max_positions
from ftlevel.task import TokenObjective
from ftlevel.tasks.base import Reply, Wanted
from ftlevel.trained.load import Trained

T = TypeVar("T")
Read = Callable[[Encoded, torch.Tensor], T]

WORTH_ASKING = 64
"""Rows from which on it pays to ask the model whether they may be packed."""

CPU_TOKENS, GPU_TOKENS = 1024, 16_384
"""Tokens of a forward pass."""

PADDED_TOKENS = 2_048
"""Places of a padded batch on a CPU, of a model that cannot take packed rows."""


class RowScorer:
    """Scores rows with a loaded model; `close` leaves it as it was.

    Args:
        trained: the model.
        batch_size: most rows of a forward pass; None leaves it to their tokens.
    """

    def __init__(self, trained: Trained, batch_size: int | None) -> None:
        self._trained = trained
        self._batch_size = batch_size
        self._fast: FastStep | None = None
        self._pad_id = trained.tokenizer.pad_token_id or 0
        self._collate = Collator(self._pad_id)

    def close(self) -> None:
        """Take the fast parts off the model."""
        if self._fast is not None:
            self._fast.remove()
            self._fast = None

    def __call__(self, rows: Sequence[Encoded], read: Read[T]) -> list[T]:
        """Return what `read` makes of each row and its logits, in order; call without gradients."""
        if self._fast is None and len(rows) >= WORTH_ASKING:
            self._fast = self._speed_up(rows)
        found: list[Any] = [None] * len(rows)
        for part in self._split([len(row.input_ids) for row in rows]):
            chosen = [rows[i] for i in part]
            for i, row, logits in zip(part, chosen, self._forward(chosen), strict=True):
                found[i] = read(row, logits)
        return found

    def _speed_up(self, rows: Sequence[Encoded]) -> FastStep:
        trained = self._trained
        budget = CPU_TOKENS if trained.device == "cpu" else GPU_TOKENS
        plan = plan_forward(trained.model, trained.kind, trained.method, trained.objective, budget)
        fast = FastStep(trained.model, plan)
        tried = (rows, self._pad_id, trained.device, trained.dtype)
        fast.check(*tried)
        fast.check_cross_entropy(trained.objective, *tried)
        fast.prune_last_layer(trained.objective, *tried)
        return fast

    @property
    def _packs(self) -> bool:
        return self._fast is not None and self._fast.plan.packs

    def _split(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the rows of each forward pass, the longest first."""
        on_cpu = self._trained.device == "cpu"
        most = (CPU_TOKENS if self._packs else PADDED_TOKENS) if on_cpu else GPU_TOKENS
        part: list[int] = []
        tokens = 0
        for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            size = lengths[row] if self._packs or not part else lengths[part[0]]
            if part and (tokens + size > most or len(part) == self._batch_size):
                yield part
                part, tokens, size = [], 0, lengths[row]
            part.append(row)
            tokens += size
        if part:
            yield part

    def _forward(self, rows: Sequence[Encoded]) -> Iterator[torch.Tensor]:
        """Yield the logits of each row of a forward pass."""
        trained, objective = self._trained, self._trained.objective
        batch = self._collate(rows)
        layout = None
        if self._packs and self._fast is not None:
            layout = PackedLayout.from_mask(batch["attention_mask"])
            if self._fast.plan.needed_tokens is not None:
                layout = layout.needing(self._fast.plan.needed_tokens(batch))
            layout = layout.to(trained.device)
        batch = {name: value.to(trained.device) for name, value in batch.items()}
        with using_layout(layout):
            if isinstance(objective, TokenObjective):
                yield from self._token_scores(batch, rows)
                return
            inputs, _ = objective.split(batch)
            logits = objective.logits(trained.model(**inputs))
        for row, scores in zip(rows, logits, strict=True):
            yield scores if objective.per_row else scores[: len(row.input_ids)]

    def _token_scores(
        self, batch: dict[str, torch.Tensor], rows: Sequence[Encoded]
    ) -> Iterator[torch.Tensor]:
        """Yield the scores (labelled, vocabulary) of each row's tokens that have a label."""
        objective = self._trained.objective
        seen: list[torch.Tensor] = []
        head = self._fast.cross_entropy if self._fast is not None else None
        if head is not None:
            supervised_loss(
                head, self._trained.model, objective, batch, lambda scores, _: seen.append(scores)
            )
        else:
            inputs, labels = objective.split(batch)
            seen.append(
                objective.targets(objective.logits(self._trained.model(**inputs)), labels)[0]
            )
        counts = [sum(label != IGNORED for label in _labels(row)) for row in rows]
        yield from torch.cat(seen).split(counts)  # type: ignore[no-untyped-call]


def shorten(row: Encoded, limit: int) -> Encoded:
    """Return `row` without the tokens before its last one that are beyond `limit`, as in training.

    The last token stays, which may be SEP or EOS.
    """
    if len(row.input_ids) <= limit:
        return row

    def cut(values: list[int]) -> list[int]:
        return values[: limit - 1] + values[-1:]

    extras = {name: cut(values) for name, values in row.extras.items()}
    return replace(row, input_ids=cut(row.input_ids), extras=extras)


def _labels(row: Encoded) -> list[int]:
    return row.labels if isinstance(row.labels, list) else []


PROMPTS = 8
"""Prompts of a forward pass, where nothing else is said."""


@dataclass(frozen=True)
class Ask:
    """What is asked.

    Attributes:
        prompts: one or more.
        context: where answers are looked for; question answering only.
        writing: how text is generated.
        batch_size: prompts a forward pass.
        questions: what rows of a file ask, after the prompts.
        places: `file:line` of each.
    """

    prompts: Sequence[str]
    context: str | None
    writing: Writing
    batch_size: int = PROMPTS
    questions: Sequence[Any] = ()
    places: Sequence[str] = ()


def answer(trained: Trained, ask: Ask) -> list[Reply]:
    """Return what `trained` says to each prompt, then to each row; call it without gradients.

    Raises:
        ConfigError: a context that is missing or not wanted, or a prompt without a mask.
        InputError: a prompt beyond the model's positions.
    """
    task = trained.task
    if ask.prompts and task.wants_context and ask.context is None:
        raise ConfigError(f"{task.name} looks for an answer in a text. Add --context TEXT.")
    if ask.context is not None and not task.wants_context:
        raise ConfigError(f"--context belongs to question answering, and this is {task.name}.")
    model = AskedModel(trained, ask.writing, ask.batch_size)
    try:
        said = task.answer(model, ask.prompts, ask.context) if ask.prompts else []
        rows = answer_questions(model, ask.questions, Wanted())
        if rows.refused:
            raise InputError([f"{ask.places[i]}: {why}." for i, why in rows.refused.items()])
        return [*said, *(reply for reply in rows.replies if reply is not None)]
    except UnansweredError as error:
        raise InputError(
            [f"--prompt {i + 1}: {reason}." for i, reason in error.reasons.items()]
        ) from None
    finally:
        model.close()


@dataclass(frozen=True)
class Answers:
    """What came back for some rows.

    Attributes:
        replies: one for each question; None where there is none.
        refused: number of a question without a reply → why.
    """

    replies: list[Reply | None]
    refused: Mapping[int, str]


def answer_questions(model: AskedModel, questions: Sequence[Any], wanted: Wanted) -> Answers:
    """Return the reply to each of `questions`; what cannot be answered leaves the others be."""
    replies: list[Reply | None] = [None] * len(questions)
    refused: dict[int, str] = {}
    left = list(range(len(questions)))
    while left:
        asked = [replace(questions[i], row=number) for number, i in enumerate(left)]
        try:
            found = model.task.answer_rows(model, asked, wanted)
        except UnansweredError as error:
            refused |= {left[number]: reason for number, reason in error.reasons.items()}
            left = [i for i in left if i not in refused]
            continue
        for i, reply in zip(left, found, strict=True):
            replies[i] = reply
        break
    return Answers(replies, refused)


class AskedModel:
    """A loaded model as its task asks it; `close` leaves the model as it was.

    Args:
        trained: the model.
        writing: how text is generated.
        batch_size: rows or prompts of a forward pass; None leaves it to their tokens.
        cuts: whether rows that are too long are shortened, where their task can be done so.
    """

    def __init__(
        self, trained: Trained, writing: Writing, batch_size: int | None, *, cuts: bool = False
    ) -> None:
        self._trained, self._writing = trained, writing
        self._batch_size, self._cuts = batch_size, cuts
        self._scorer = RowScorer(trained, batch_size)
        self._decoder: RowDecoder | Literal[False] | None = None  # False where there can be none
        self._positions = max_positions(trained.model.config)
        self.shortened = 0
        self.task = trained.task
        self.tokenizer = trained.tokenizer
        self.kind = trained.kind
        self.labels: Sequence[str] = trained.labels
        self.options = trained.options
        self.max_length = trained.max_length
        self.prompt_format = trained.prompt_format

    def close(self) -> None:
        """Take off the model what made it faster."""
        self._scorer.close()
        if self._decoder:
            self._decoder.close()
            self._decoder = None

    def write(self, prompts: Sequence[list[int]]) -> list[str]:
        """Return the text that it writes after each prompt."""
        prompts = self._fit_prompts(prompts)
        trained, size = self._trained, self._batch_size or PROMPTS
        if self._decoder is None and len(prompts) > size and self._writing.is_greedy:
            self._decoder = open_decoder(trained, prompts)
        if not self._decoder:
            return generate_texts(
                trained.model, trained.tokenizer, prompts, trained.device, size, self._writing
            )
        texts = self._decoder(prompts, self._writing.max_new_tokens, size)
        said = trained.tokenizer.batch_decode(texts, skip_special_tokens=True)
        return [str(text).strip() for text in said]

    def _fit_prompts(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Return `prompts`, shortened at their beginning where they leave no room for an answer."""
        if self._positions is None:
            return list(prompts)
        new = 0 if self.kind == "encoder-decoder" else self._writing.max_new_tokens
        room = self._positions - new
        over = {i: len(ids) for i, ids in enumerate(prompts) if len(ids) > room}
        if over and not (self._cuts and room > 1):
            answer = f" with --max-new-tokens {new:,}" if new else ""
            raise UnansweredError({
                i: f"has {length:,} tokens, and the model takes {max(room, 0):,}{answer}"
                for i, length in over.items()
            })  # fmt: skip
        self.shortened += len(over)
        return [ids[:1] + ids[1 - room :] if i in over else ids for i, ids in enumerate(prompts)]

    def score(self, rows: Sequence[Encoded], read: Callable[[Encoded, torch.Tensor], T]) -> list[T]:
        """Return what `read` makes of each row and its logits, in order."""
        positions = self._positions
        if positions is not None:
            over = [row for row in rows if len(row.input_ids) > positions]
            if refused := {
                row.row: f"has {len(row.input_ids):,} tokens, and the model takes {positions:,}"
                for row in over
                if not self._cuts or isinstance(row.labels, list)  # it has something at each token
            }:
                raise UnansweredError(refused)
            self.shortened += len(over)
            rows = [shorten(row, positions) for row in rows] if over else rows
        return self._scorer(rows, read)


@contextlib.contextmanager
def asking(model: AskedModel, trained: Trained) -> Iterator[None]:
    """Ask `trained` inside the block: without gradients, in the precision of its training."""
    try:
        with torch.no_grad(), autocast(trained.device, trained.dtype):
            yield
    finally:
        model.close()


MOST_SHOWN = 5
"""Rows without an answer that are named; the others are counted."""


@dataclass
class Tally:
    """What became of the rows so far.

    Attributes:
        output: the file that they go to, if any.
        kept: rows that were there already.
        answered: rows that were gone through since.
        skipped: rows of these that have no answer.
        shown: the first of them, with their places and reasons.
        shortened: rows that lost tokens.
        seconds: that answering took, without loading the model.
    """

    output: Path | None
    kept: int = 0
    answered: int = 0
    skipped: int = 0
    shown: list[str] = field(default_factory=list)
    shortened: int = 0
    seconds: float = 0.0

    def skip(self, window: Sequence[AskedRow], faults: Mapping[int, str]) -> None:
        """Count the rows of `window` that have no answer, by their index in it."""
        self.skipped += len(faults)
        self.shown += [f"{window[i].place}: {faults[i]}" for i in sorted(faults)]
        del self.shown[MOST_SHOWN:]

    def describe_bad(self, window: Sequence[AskedRow], faults: Mapping[int, str]) -> list[str]:
        """Return a message for each of the first rows that cannot be answered, and what to do."""
        lines = [f"{window[i].place}: {faults[i]}." for i in sorted(faults)]
        more = f" and {len(lines) - MOST_SHOWN:,} more" if len(lines) > MOST_SHOWN else ""
        rows = "It" if len(lines) == 1 else f"These{more}"
        done = self._describe_done()
        lines = lines[:MOST_SHOWN]
        lines[-1] += (
            f" {rows} cannot be answered. Fix what is wrong, or leave the answer empty by "
            f"--on-bad-row skip.{' ' if done else ''}{done}"
        )
        return lines

    def describe_stop(self) -> str:
        """Return what is said when the user stops the command."""
        return f"interrupted; {self._describe_done() or 'nothing was kept.'}"

    def _describe_done(self) -> str:
        done = self.kept + self.answered
        if self.output is None or not done:
            return ""
        return f"{done:,} rows are in {partial_of(self.output)}: --resume goes on with them."

    def warnings(self) -> Iterator[str]:
        """Yield what the user should know at the end."""
        if self.skipped:
            more = "; …" if self.skipped > len(self.shown) else ""
            yield (
                f"{self.skipped:,} of {self.answered:,} rows have no answer "
                f"({'; '.join(self.shown)}{more})"
            )
        if self.shortened:
            yield f"{self.shortened:,} rows were shortened to what the model takes"
