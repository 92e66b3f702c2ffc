"""Rows of judged answers: a prompt once, and the answers behind it.

A pair lies in one row, prompt, preferred and rejected answer end to end, so that no cut, shuffle or
micro-batch tears it. What goes through the model are its two branches.

From judged examples to rows: one template for both answers, and one prompt, token by token.

What the gate asks of judged answers: equal ones, contradictions, and what a length tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ftlevel.data.encoding.encode import (
    IGNORED,
    Encoded,
    PromptFormat,
    RowError,
    encode_causal,
    encode_seq2seq,
)
from ftlevel.data.formats.examples import Conversation
from ftlevel.data.formats.turns import Message
from ftlevel.data.sources.lines import Computed
from ftlevel.tasks.preferences.formats import JudgedExample, PairExample, say

if TYPE_CHECKING:
    from ftlevel.data.gate.flat import Mask


Verdict = tuple[float, float, float]
UNKNOWN = float("nan")
"""The reference's log-probability before it is computed: a loss made of it stops the run."""


@dataclass(frozen=True)
class PairRow(Encoded):
    """Two answers to one prompt: `input_ids` are the prompt, the preferred and the rejected one.

    Attributes:
        prompt: tokens of the prompt; 0 where it is the source of an encoder-decoder.
        chosen: tokens of the preferred answer.
        margin: by which a reward model should tell the two apart.
        reference: log-likelihoods of the two by the reference; none where there is no reference.
    """

    prompt: int = field(default=0, metadata={"column": "int"})
    chosen: int = field(default=0, metadata={"column": "int"})
    margin: float = field(default=0.0, metadata={"column": "json"})
    reference: tuple[float, ...] = field(default=(UNKNOWN, UNKNOWN), metadata={"column": "json"})

    @property
    def is_apart(self) -> bool:
        """Whether the answers are apart from what they answer, as an encoder-decoder's are."""
        return not self.prompt

    @property
    def branches(self) -> Sequence[Encoded]:
        """The prompt with the preferred answer, and with the rejected one."""
        ids, labels = self.input_ids, _labels(self)
        if self.is_apart:
            parts = labels[: self.chosen], labels[self.chosen :]
            return [Encoded(ids, part, self.row) for part in parts]
        start, end = slice(0, self.prompt), self.prompt + self.chosen
        return [
            Encoded(ids[:end], labels[:end], self.row),
            Encoded(ids[start] + ids[end:], labels[start] + labels[end:], self.row),
        ]

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """The first is preferred."""
        first, second = self.reference or (0.0, 0.0)
        return (1.0, first, self.margin), (0.0, second, self.margin)

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longer answer."""
        if self.is_apart:
            return len(self.input_ids)
        return self.prompt + max(self.chosen, len(self.input_ids) - self.prompt - self.chosen)

    def without(self, count: int) -> Encoded:
        """Return the row with a prompt that is shorter by `count` tokens, for both answers."""
        shorter = super().without(count)
        return replace(shorter, prompt=self.prompt - count)  # type: ignore[call-arg]


@dataclass(frozen=True)
class ScoredPairRow(PairRow):
    """Two answers to one prompt that get a score each, and nothing is learned token by token."""

    @property
    def branches(self) -> Sequence[Encoded]:
        """As of a pair; the label says nothing."""
        return [replace(branch, labels=0) for branch in super().branches]


@dataclass(frozen=True)
class JudgedRow(Encoded):
    """An answer that is good or bad, and an answer to another prompt that it contrasts with.

    Attributes:
        prompt: tokens of the prompt; 0 where it is the source of an encoder-decoder.
        desirable: 1 for a good answer, 0 for a bad one.
        reference: log-likelihoods by the reference of the answer, and of the other one after this
            prompt; none where there is no reference.
        other: ids and labels of the other answer, end to end.
    """

    prompt: int = field(default=0, metadata={"column": "int"})
    desirable: int = field(default=1, metadata={"column": "int"})
    reference: tuple[float, ...] = field(default=(UNKNOWN, UNKNOWN), metadata={"column": "json"})
    other: tuple[int, ...] = field(default=(), metadata={"column": "ints"})

    @property
    def branches(self) -> Sequence[Encoded]:
        """The prompt with the answer."""
        return [Encoded(self.input_ids, self.labels, self.row)]

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """Whether it is good; nothing is taken off its reward before the step has begun."""
        return ((float(self.desirable), (self.reference or (0.0,))[0], 0.0),)

    @property
    def contrasts(self) -> Sequence[Encoded]:
        """The prompt with the other answer."""
        if not self.other:
            return ()
        half = len(self.other) // 2
        ids, labels = list(self.other[:half]), list(self.other[half:])
        if self.prompt:
            ids = self.input_ids[: self.prompt] + ids
            labels = _labels(self)[: self.prompt] + labels
        else:
            ids = self.input_ids
        reference = (self.reference or (0.0, 0.0))[-1]
        return [ContrastRow(ids, labels, self.row, {}, reference)]

    @property
    def answer(self) -> tuple[list[int], list[int]]:
        """Ids and labels of its answer."""
        return self.input_ids[self.prompt :] if self.prompt else _labels(self), _labels(self)[
            self.prompt :
        ]

    def without(self, count: int) -> Encoded:
        """Return the row with a prompt that is shorter by `count` tokens."""
        shorter = super().without(count)
        return replace(shorter, prompt=self.prompt - count)  # type: ignore[call-arg]


@dataclass(frozen=True)
class ContrastRow(Encoded):
    """An answer to another prompt than the one before it.

    Attributes:
        reference: its log-likelihood by the reference.
    """

    reference: float = field(default=UNKNOWN, metadata={"column": "json"})

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """Neither good nor bad."""
        return ((0.0, self.reference, 0.0),)


class ContrastedRows(Computed[Encoded]):
    """Judged answers, each with the answer of the row before it that has another prompt.

    Args:
        rows: of `JudgedRow`, in the order of the data.
        most: tokens of a row at most; a longer contrast loses its end.
    """

    def __init__(self, rows: Sequence[Encoded], most: int) -> None:
        self.rows = rows
        self._most = most
        prompts = [_prompt(row) for row in rows]
        self._partner = np.zeros(len(rows), dtype=np.int64)
        for index in range(len(rows)):
            partner = index - 1
            while partner > index - len(rows) and prompts[partner] == prompts[index]:
                partner -= 1
            self._partner[index] = partner % len(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def _item(self, at: int) -> Encoded:
        row, partner = self.rows[at], self.rows[int(self._partner[at])]
        if not isinstance(row, JudgedRow) or not isinstance(partner, JudgedRow):
            raise TypeError("judged answers contrast with judged answers")
        room = max(1, self._most - row.prompt) if row.prompt else None
        ids, labels = (part[:room] for part in partner.answer)
        return replace(row, other=(*ids, *labels))


class ReferencedRows(Computed[Encoded]):
    """Rows with what the reference says of them.

    Args:
        rows: of `PairRow` or `JudgedRow`.
        reference: (rows, 2) log-likelihoods of the two sequences of each; None for no reference.
    """

    def __init__(self, rows: Sequence[Encoded], reference: np.ndarray | None) -> None:
        self.rows = rows
        self.reference = reference

    def __len__(self) -> int:
        return len(self.rows)

    def _item(self, at: int) -> Encoded:
        row: Any = self.rows[at]
        known = () if self.reference is None else tuple(self.reference[at].tolist())
        return replace(row, reference=known)


def _prompt(row: Encoded) -> tuple[int, ...]:
    if not isinstance(row, JudgedRow):
        raise TypeError("judged answers contrast with judged answers")
    return tuple(row.input_ids[: row.prompt] if row.prompt else row.input_ids)


def _labels(row: Encoded) -> list[int]:
    if not isinstance(row.labels, list):
        raise TypeError("answers have a label for each token")
    return row.labels


def pair_up(
    first: Encoded, second: Encoded, prompt: int, margin: float, *, scored: bool
) -> PairRow:
    """Return the row of two encoded answers that share their first `prompt` tokens.

    Args:
        first: the prompt with the preferred answer.
        second: the prompt with the rejected one.
        prompt: tokens of the prompt; 0 for an encoder-decoder's.
        margin: as of `PairRow`.
        scored: whether answers get a score each.
    """
    kind = ScoredPairRow if scored else PairRow
    one, two = _labels(first), _labels(second)
    if not prompt:
        return kind(first.input_ids, one + two, first.row, {}, 0, len(one), margin)
    masked = [IGNORED] * prompt
    return kind(
        first.input_ids + second.input_ids[prompt:],
        masked + one[prompt:] + two[prompt:],
        first.row,
        {},
        prompt,
        len(first.input_ids) - prompt,
        margin,
    )


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


BIASED = 0.8
"""Share of pairs from which on a judge of length alone does too well, or too badly."""
FEWEST = 20
"""Pairs below which such a share says little."""


def look_at_pairs(rows: Sequence[Encoded]) -> Mapping[str, Mask]:
    """Return the pairs of equal answers, and those that an earlier one contradicts."""
    import numpy as np

    equal, against = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    seen: set[tuple[bytes, bytes]] = set()
    for index, row in enumerate(rows):
        if not isinstance(row, PairRow):
            continue
        first, second = (
            np.array(branch.labels if row.is_apart else branch.input_ids, np.int32).tobytes()
            for branch in _whole(row)
        )
        if row.is_apart:
            source = np.array(row.input_ids, np.int32).tobytes()
            first, second = source + b"|" + first, source + b"|" + second
        equal[index] = first == second
        against[index] = (second, first) in seen and not equal[index]
        seen.add((first, second))
    return {"equal_answers": equal, "contradicting_pairs": against}


def _whole(row: PairRow) -> Sequence[Encoded]:
    return PairRow.branches.fget(row)  # type: ignore[attr-defined] # also where labels are scores


def judge_answers(examples: Sequence[Any], loss: str) -> Sequence[tuple[str, int, str]]:
    """Return (check of the gate, examples with it, what it is) for the set as a whole."""
    pairs = [example for example in examples if isinstance(example, PairExample)]
    found: list[tuple[str, int, str]] = []
    if pairs:
        found += _length_bias(pairs)
        scored = [pair for pair in pairs if len(pair.scores) > 1]
        worse = [pair for pair in scored if pair.scores[0] <= pair.scores[1]]
        if worse:
            told = f"row {worse[0].row + 1}: {worse[0].scores[0]:g} against {worse[0].scores[1]:g}"
            found.append(("scores_disagree", len(worse), told))
        leaks = [pair for pair in pairs if _repeats(pair)]
        if leaks:
            found.append(("prompt_in_answer", len(leaks), f"row {leaks[0].row + 1}"))
        return found
    judged = [example for example in examples if isinstance(example, JudgedExample)]
    good = sum(example.desirable for example in judged)
    if judged and good in (0, len(judged)):
        word = "desirable" if good else "undesirable"
        found.append(("one_verdict", len(judged), f"all are {word}, and --loss {loss} needs both"))
    return found


def _length_bias(pairs: Sequence[PairExample]) -> list[tuple[str, int, str]]:
    """Return how well a judge of length alone would do, where that is too well or too badly."""
    sizes = [(len(say(pair.chosen)), len(say(pair.rejected))) for pair in pairs]
    longer = sum(a > b for a, b in sizes)
    share = (longer + sum(a == b for a, b in sizes) / 2) / len(pairs)
    if len(pairs) < FEWEST or 1 - BIASED < share < BIASED:
        return []
    way = "longer" if share >= BIASED else "shorter"
    count = longer if share >= BIASED else len(pairs) - longer
    told = (
        f"a judge of length alone, for the {way} one, would be right in {max(share, 1 - share):.0%}"
    )
    return [("length_bias", count, told)]


def _repeats(pair: PairExample) -> bool:
    """Whether an answer begins with all that the last turn asked, three words or more."""
    asked = pair.prompt[-1].content.strip()
    return len(asked.split()) > 2 and any(
        say(answer).strip().startswith(asked) for answer in (pair.chosen, pair.rejected)
    )
