"""How a model of any task answers prompts and rows: the task says what to ask, this runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import ConfigError, InputError, UnansweredError
from ftlevel.evaluation.decoding import RowDecoder, open_decoder
from ftlevel.evaluation.row_scores import RowScorer, shorten
from ftlevel.evaluation.scoring import Writing, generate_texts
from ftlevel.models.hardware import autocast
from ftlevel.models.kinds import max_positions
from ftlevel.tasks.base import Reply, Wanted
from ftlevel.trained.load import Trained

T = TypeVar("T")
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
