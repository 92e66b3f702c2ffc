"""From judged examples to rows: one template for both answers, and one prompt, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftlevel.data.encoding.encode import (
    IGNORED,
    Encoded,
    RowError,
    encode_causal,
    encode_seq2seq,
)
from ftlevel.data.encoding.prompts import PromptFormat
from ftlevel.data.formats.examples import Conversation
from ftlevel.data.formats.turns import Message
from ftlevel.tasks.preferences.formats import JudgedExample, PairExample
from ftlevel.tasks.preferences.rows import UNKNOWN, JudgedRow, pair_up

_JOINED = 2
"""Tokens at the seam that a tokenizer may make of the prompt's end and the answer's beginning."""


@dataclass(frozen=True)
class JudgedEncoder:
    """Encodes examples; it is passed to other processes.

    Attributes:
        tokenizer: the model's.
        prompt_format: how prompts are laid out.
        kind: of the model: the answers of an encoder-decoder are apart from what they answer, and
            an encoder reads both as one text.
        judged: whether pairs become two judged answers.
        scored: whether answers get a score each.
        referenced: whether the reference's log-likelihoods will be known.
    """

    tokenizer: Any
    prompt_format: PromptFormat
    kind: str
    judged: bool
    scored: bool
    referenced: bool

    def __call__(self, examples: Sequence[Any]) -> list[Encoded]:
        """Return a row for each pair, or for each judged answer.

        Raises:
            RowError: the two answers have not the same prompt, token by token.
        """
        good = self._encode([_answered(example) for example in examples])
        if not isinstance(examples[0], PairExample):
            return [
                self._judge(row, example, example.desirable)
                for row, example in zip(good, examples, strict=True)
            ]
        bad = self._encode([_rejecting(example) for example in examples])
        rows: list[Encoded] = []
        for one, two, example in zip(good, bad, examples, strict=True):
            if self.judged:
                both = [self._judge(one, example, True), self._judge(two, example, False)]
                # By turns, so that answers contrast with good ones as often as with bad ones.
                rows += both if example.row % 2 else both[::-1]
            else:
                rows.append(self._pair(one, two, example))
        return rows

    def answers(self, examples: Sequence[JudgedExample]) -> list[Encoded]:
        """Return each prompt with its answer, as it is scored."""
        return self._encode([_answered(example) for example in examples])

    @property
    def seq2seq(self) -> bool:
        """Whether answers are apart from what they answer."""
        return self.kind == "encoder-decoder"

    def _encode(self, talks: Sequence[Conversation]) -> list[Encoded]:
        if self.kind == "encoder":
            return [_as_one_text(self.tokenizer, talk) for talk in talks]
        encode = encode_seq2seq if self.seq2seq else encode_causal
        return encode(self.tokenizer, talks, self.prompt_format)

    @property
    def _reference(self) -> tuple[float, ...]:
        return (UNKNOWN, UNKNOWN) if self.referenced else ()

    def _pair(self, one: Encoded, two: Encoded, example: PairExample) -> Encoded:
        prompt = 0
        if not self.seq2seq:
            encoder = self.kind == "encoder"
            starts = [find_answer(row, example.prompt, encoder=encoder) for row in (one, two)]
            prompt = count_common(one, two, min(starts))
            if prompt < min(starts) - _JOINED:
                raise RowError(
                    example.row,
                    f"has another prompt before each answer, from token {prompt + 1} on: the chat "
                    f"template of {self.tokenizer.name_or_path} writes it by what follows. Use "
                    "another one: --chat-template.",
                )
            one, two = (_answer_alone(row, at) for row, at in zip((one, two), starts, strict=True))
        row = pair_up(one, two, prompt, example.margin, scored=self.scored)
        return replace(row, reference=self._reference)

    def _judge(self, row: Encoded, example: Any, desirable: bool) -> Encoded:
        prompt = 0
        if not self.seq2seq:
            prompt = find_answer(row, example.prompt)
            row = _answer_alone(row, prompt)
        return JudgedRow(
            row.input_ids, row.labels, row.row, {}, prompt, int(desirable), self._reference
        )


def _as_one_text(tokenizer: Any, talk: Conversation) -> Encoded:
    """Return what was said before the last turn, and that turn, each ended by SEP."""
    *before, last = talk.messages
    start = list(tokenizer("\n\n".join(turn.content for turn in before))["input_ids"])
    end = list(tokenizer(last.content, add_special_tokens=False)["input_ids"])
    end.append(tokenizer.sep_token_id)
    return Encoded(start + end, [IGNORED] * len(start) + end, talk.row)


def _answered(example: PairExample | JudgedExample) -> Conversation:
    answer = example.chosen if isinstance(example, PairExample) else example.answer
    return Conversation((*example.prompt, *answer), example.row, example.tools)


def _rejecting(example: PairExample) -> Conversation:
    return Conversation((*example.prompt, *example.rejected), example.row, example.tools)


def find_answer(row: Encoded, prompt: Sequence[Message], *, encoder: bool = False) -> int:
    """Return the place of the first token of the answer behind the turns of `prompt`.

    Each turn of the assistant is a run of tokens with a label; those of the prompt come first.

    Raises:
        RowError: the answer has no token of its own.
    """
    labels = row.labels if isinstance(row.labels, list) else []
    if encoder:
        return next(at for at, label in enumerate(labels) if label != IGNORED)
    before = sum(turn.role == "assistant" for turn in prompt)
    starts = [
        at
        for at, label in enumerate(labels)
        if label != IGNORED and (not at or labels[at - 1] == IGNORED)
    ]
    if len(starts) <= before:
        raise RowError(row.row, "has an answer without a token of its own.")
    return starts[before]


def count_common(one: Encoded, two: Encoded, most: int) -> int:
    """Return how many of the first `most` tokens both rows have."""
    pairs = zip(one.input_ids[:most], two.input_ids[:most], strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), most)


def _answer_alone(row: Encoded, start: int) -> Encoded:
    """Return `row` without the labels of earlier answers."""
    labels = row.labels if isinstance(row.labels, list) else []
    return replace(row, labels=[IGNORED] * start + labels[start:])
