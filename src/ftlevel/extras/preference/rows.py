"""Encoded rows of preference data, their encoder, and their data checks.

A pair is one row: prompt, preferred and rejected answer concatenated, so that batching never
separates them. The model receives two sequences: the prompt with each answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ftlevel.data.encoding.encode import encode_causal, encode_seq2seq
from ftlevel.data.encoding.prompts import PromptFormat
from ftlevel.data.encoding.row import IGNORED, Encoded, RowError
from ftlevel.data.formats.examples import Conversation
from ftlevel.data.formats.labels import common_prefix_length
from ftlevel.data.formats.turns import Message
from ftlevel.data.sources.lines import RowView
from ftlevel.extras.preference.formats import LabeledCompletion, PairExample, join_turns

if TYPE_CHECKING:
    from ftlevel.data.gate.checks import Mask


PreferenceLabel = tuple[float, float, float]
UNKNOWN = float("nan")
"""Reference log-probability before it is computed; NaN, so that an accidental use stops the run."""


@dataclass(frozen=True)
class _PromptedRow(Encoded):
    prompt: int = field(default=0, metadata={"column": "int"})

    def without(self, num_tokens: int) -> Encoded:
        shorter = super().without(num_tokens)
        return replace(shorter, prompt=self.prompt - num_tokens)  # type: ignore[call-arg]


@dataclass(frozen=True)
class PairRow(_PromptedRow):
    """Two answers to one prompt; `input_ids` concatenates prompt, preferred and rejected answer.

    `prompt` and `chosen` are token counts; `prompt` is 0 for an encoder-decoder. `reference` has
    the reference log-likelihoods of both answers; empty without a reference.
    """

    has_several_texts = True
    chosen: int = field(default=0, metadata={"column": "int"})
    margin: float = field(default=0.0, metadata={"column": "json"})
    reference: tuple[float, ...] = field(default=(UNKNOWN, UNKNOWN), metadata={"column": "json"})

    @property
    def is_apart(self) -> bool:
        """Whether the answers are separate from the prompt, as in an encoder-decoder."""
        return not self.prompt

    @property
    def sequences(self) -> Sequence[Encoded]:
        """The prompt with the preferred answer, and the prompt with the rejected answer."""
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
    def loss_inputs(self) -> Mapping[str, Sequence[PreferenceLabel]]:
        """Per answer: (1.0 if preferred else 0.0, reference log-likelihood, margin)."""
        first, second = self.reference or (0.0, 0.0)
        return {"preference_labels": [(1.0, first, self.margin), (0.0, second, self.margin)]}

    @property
    def length(self) -> int:
        if self.is_apart:
            return len(self.input_ids)
        return self.prompt + max(self.chosen, len(self.input_ids) - self.prompt - self.chosen)


@dataclass(frozen=True)
class ScoredPairRow(PairRow):
    """Two answers to one prompt for a reward model, without token labels."""

    @property
    def sequences(self) -> Sequence[Encoded]:
        """The sequences as in a `PairRow`, with a dummy label."""
        return [replace(sequence, labels=0) for sequence in super().sequences]


@dataclass(frozen=True)
class LabeledAnswerRow(_PromptedRow):
    """A labeled answer, and a contrast answer: one to a different prompt, for the KL term of kto.

    `prompt` is the number of prompt tokens, 0 for an encoder-decoder. `reference` has the reference
    model's log-likelihoods of both answers; `other` the contrast answer's ids, then its labels.
    """

    desirable: int = field(default=1, metadata={"column": "int"})
    reference: tuple[float, ...] = field(default=(UNKNOWN, UNKNOWN), metadata={"column": "json"})
    other: tuple[int, ...] = field(default=(), metadata={"column": "ints"})

    @property
    def sequences(self) -> Sequence[Encoded]:
        return [Encoded(self.input_ids, self.labels, self.row)]

    @property
    def loss_inputs(self) -> Mapping[str, Sequence[PreferenceLabel]]:
        """(1.0 if desirable else 0.0, reference log-likelihood, 0.0 in place of the baseline)."""
        label = float(self.desirable), (self.reference or (0.0,))[0], 0.0
        return {"preference_labels": [label]}

    @property
    def contrasts(self) -> Sequence[Encoded]:
        """The prompt with the contrast answer, that of another prompt; empty without one."""
        if not self.other:
            return ()
        half = len(self.other) // 2
        ids, labels = list(self.other[:half]), list(self.other[half:])
        if self.prompt:
            ids = self.input_ids[: self.prompt] + ids
            labels = _labels(self)[: self.prompt] + labels
        else:
            ids = self.input_ids
        return [ContrastRow(ids, labels, self.row, {}, (self.reference or (0.0, 0.0))[-1])]

    @property
    def answer(self) -> tuple[list[int], list[int]]:
        """Ids and labels of the answer."""
        return self.input_ids[self.prompt :] if self.prompt else _labels(self), _labels(self)[
            self.prompt :
        ]


@dataclass(frozen=True)
class ContrastRow(Encoded):
    """A prompt with the answer to another prompt; `reference` is the reference's log-likelihood."""

    reference: float = field(default=UNKNOWN, metadata={"column": "json"})

    @property
    def loss_inputs(self) -> Mapping[str, Sequence[PreferenceLabel]]:
        """(0, reference log-likelihood, 0); the answer has no label."""
        return {"preference_labels": [(0.0, self.reference, 0.0)]}


class ContrastedRows(RowView[Encoded]):
    """Labeled answers with contrast answers, from the nearest previous row with another prompt.

    `rows` are `LabeledAnswerRow` in data order. Contrast answers are truncated so that prompt and
    answer have at most `max_length` tokens.
    """

    def __init__(self, rows: Sequence[Encoded], max_length: int) -> None:
        self.rows = rows
        self._max_length = max_length
        prompts = [_prompt(row) for row in rows]
        self._partner = np.zeros(len(rows), dtype=np.int64)
        for index in range(len(rows)):
            partner = index - 1
            while partner > index - len(rows) and prompts[partner] == prompts[index]:
                partner -= 1
            self._partner[index] = partner % len(rows)

    def _item(self, at: int) -> Encoded:
        row, partner = self.rows[at], self.rows[int(self._partner[at])]
        if not isinstance(row, LabeledAnswerRow) or not isinstance(partner, LabeledAnswerRow):
            raise TypeError("judged answers contrast with judged answers")
        room = max(1, self._max_length - row.prompt) if row.prompt else None
        ids, labels = (part[:room] for part in partner.answer)
        return replace(row, other=(*ids, *labels))


class ReferencedRows(RowView[Encoded]):
    """Rows with reference log-likelihoods `(rows, 2)`, or empty ones if `reference` is None."""

    def __init__(self, rows: Sequence[Encoded], reference: np.ndarray | None) -> None:
        self.rows = rows
        self.reference = reference

    def _item(self, at: int) -> Encoded:
        row: Any = self.rows[at]
        reference = () if self.reference is None else tuple(self.reference[at].tolist())
        return replace(row, reference=reference)


def _prompt(row: Encoded) -> tuple[int, ...]:
    if not isinstance(row, LabeledAnswerRow):
        raise TypeError("judged answers contrast with judged answers")
    return tuple(row.input_ids[: row.prompt] if row.prompt else row.input_ids)


def _labels(row: Encoded) -> list[int]:
    if not isinstance(row.labels, list):
        raise TypeError("answers have a label for each token")
    return row.labels


def create_pair_row(
    first: Encoded, second: Encoded, prompt: int, margin: float, *, scored: bool
) -> PairRow:
    """Create a row of two sequences with `prompt` common tokens; `scored`: for a reward model."""
    row_class = ScoredPairRow if scored else PairRow
    one, two = _labels(first), _labels(second)
    if not prompt:
        return row_class(first.input_ids, one + two, first.row, {}, 0, len(one), margin)
    masked = [IGNORED] * prompt
    return row_class(
        first.input_ids + second.input_ids[prompt:],
        masked + one[prompt:] + two[prompt:],
        first.row,
        {},
        prompt,
        len(first.input_ids) - prompt,
        margin,
    )


_JOINED = 2
"""Number of tokens at the end of the prompt that a tokenizer may merge with the answer."""


@dataclass(frozen=True)
class PreferenceEncoder:
    """Callable that encodes preference examples; it is picklable for worker processes.

    `judged` splits pairs into labeled answers; `scored` encodes for reward models; `referenced`
    rows get their reference log-likelihoods later.
    """

    tokenizer: Any
    prompt_format: PromptFormat
    kind: str
    judged: bool
    scored: bool
    referenced: bool

    def __call__(self, examples: Sequence[Any]) -> list[Encoded]:
        """Returns one row per pair or answer; raises `RowError` if the prompts of a pair differ."""
        chosen = self._encode([_chosen_conversation(example) for example in examples])
        if not isinstance(examples[0], PairExample):
            return [
                self._judge(row, example, example.desirable)
                for row, example in zip(chosen, examples, strict=True)
            ]
        rejected = self._encode([_rejected_conversation(example) for example in examples])
        rows: list[Encoded] = []
        for one, two, example in zip(chosen, rejected, examples, strict=True):
            if self.judged:
                pair = [self._judge(one, example, True), self._judge(two, example, False)]
                # Alternate, so that answers contrast equally often with good and bad ones.
                rows += pair if example.row % 2 else pair[::-1]
            else:
                rows.append(self._pair(one, two, example))
        return rows

    def answers(self, examples: Sequence[LabeledCompletion]) -> list[Encoded]:
        """Returns one row of prompt and answer per example, for a reward model to score."""
        return self._encode([_chosen_conversation(example) for example in examples])

    def _encode(self, talks: Sequence[Conversation]) -> list[Encoded]:
        if self.kind == "encoder":
            return [_encode_sentence_pair(self.tokenizer, talk) for talk in talks]
        encode = encode_seq2seq if self.kind == "encoder-decoder" else encode_causal
        return encode(self.tokenizer, talks, self.prompt_format)

    @property
    def _reference(self) -> tuple[float, ...]:
        return (UNKNOWN, UNKNOWN) if self.referenced else ()

    def _pair(self, one: Encoded, two: Encoded, example: PairExample) -> Encoded:
        prompt = 0
        if self.kind != "encoder-decoder":  # else the answers are apart from the prompt
            encoder = self.kind == "encoder"
            starts = [get_answer(row, example.prompt, encoder=encoder) for row in (one, two)]
            prompt = min(common_prefix_length(one.input_ids, two.input_ids), *starts)
            if prompt < min(starts) - _JOINED:
                raise RowError(
                    example.row,
                    f"encodes the prompt differently for each answer, from token {prompt + 1} "
                    f"on: the chat template of {self.tokenizer.name_or_path} depends on what "
                    f"follows. Choose another with --chat-template.",
                )
            one, two = (_mask_earlier(row, at) for row, at in zip((one, two), starts, strict=True))
        row = create_pair_row(one, two, prompt, example.margin, scored=self.scored)
        return replace(row, reference=self._reference)

    def _judge(self, row: Encoded, example: Any, desirable: bool) -> Encoded:
        prompt = 0
        if self.kind != "encoder-decoder":
            prompt = get_answer(row, example.prompt)
            row = _mask_earlier(row, prompt)
        return LabeledAnswerRow(
            row.input_ids, row.labels, row.row, {}, prompt, int(desirable), self._reference
        )


def _encode_sentence_pair(tokenizer: Any, talk: Conversation) -> Encoded:
    *earlier, last = talk.messages
    start = list(tokenizer("\n\n".join(turn.content for turn in earlier))["input_ids"])
    end = list(tokenizer(last.content, add_special_tokens=False)["input_ids"])
    end.append(tokenizer.sep_token_id)
    return Encoded(start + end, [IGNORED] * len(start) + end, talk.row)


def _chosen_conversation(example: PairExample | LabeledCompletion) -> Conversation:
    answer = example.chosen if isinstance(example, PairExample) else example.answer
    return Conversation((*example.prompt, *answer), example.row, example.tools)


def _rejected_conversation(example: PairExample) -> Conversation:
    return Conversation((*example.prompt, *example.rejected), example.row, example.tools)


def get_answer(row: Encoded, prompt: Sequence[Message], *, encoder: bool = False) -> int:
    """Returns the index of the first answer token, after the turns `prompt`; RowError if none."""
    labels = row.labels if isinstance(row.labels, list) else []
    if encoder:
        return next(at for at, label in enumerate(labels) if label != IGNORED)
    earlier = sum(turn.role == "assistant" for turn in prompt)
    starts = [
        at
        for at, label in enumerate(labels)
        if label != IGNORED and (not at or labels[at - 1] == IGNORED)
    ]
    if len(starts) <= earlier:
        raise RowError(row.row, "has an answer without a token of its own.")
    return starts[earlier]


def _mask_earlier(row: Encoded, start: int) -> Encoded:
    return replace(row, labels=[IGNORED] * start + _labels(row)[start:])


BIASED = 0.8
"""Share of pairs at which always choosing the longer (or shorter) answer counts as length bias."""
FEWEST = 20
"""Minimum number of pairs for the length-bias check."""


def check_pairs(rows: Sequence[Encoded]) -> Mapping[str, Mask]:
    """Returns masks of rows: `equal_answers`; `contradicting_pairs`, swaps of an earlier pair."""
    equal, against = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    seen: set[tuple[bytes, bytes]] = set()
    for index, row in enumerate(rows):
        if not isinstance(row, PairRow):
            continue
        first, second = (
            np.array(sequence.labels if row.is_apart else sequence.input_ids, np.int32).tobytes()
            for sequence in row.sequences
        )
        if row.is_apart:
            source = np.array(row.input_ids, np.int32).tobytes()
            first, second = source + b"|" + first, source + b"|" + second
        equal[index] = first == second
        against[index] = (second, first) in seen and not equal[index]
        seen.add((first, second))
    return {"equal_answers": equal, "contradicting_pairs": against}


def check_answers(examples: Sequence[Any], loss: str) -> Sequence[tuple[str, int, str]]:
    """Returns (check name, number of examples, description) per failed check of pairs or labels."""
    pairs = [example for example in examples if isinstance(example, PairExample)]
    findings: list[tuple[str, int, str]] = []
    if pairs:
        findings += _get_length_bias(pairs)
        scored = [pair for pair in pairs if len(pair.scores) > 1]
        worse = [pair for pair in scored if pair.scores[0] <= pair.scores[1]]
        if worse:
            description = (
                f"row {worse[0].row + 1}: {worse[0].scores[0]:g} against {worse[0].scores[1]:g}"
            )
            findings.append(("scores_disagree", len(worse), description))
        leaks = [pair for pair in pairs if _repeats_prompt(pair)]
        if leaks:
            findings.append(("prompt_in_answer", len(leaks), f"row {leaks[0].row + 1}"))
        return findings
    judged = [example for example in examples if isinstance(example, LabeledCompletion)]
    num_chosen = sum(example.desirable for example in judged)
    if judged and num_chosen in (0, len(judged)):
        word = "desirable" if num_chosen else "undesirable"
        findings.append(
            ("one_verdict", len(judged), f"all are {word}, and --loss {loss} needs both")
        )
    return findings


def _get_length_bias(pairs: Sequence[PairExample]) -> list[tuple[str, int, str]]:
    sizes = [(len(join_turns(pair.chosen)), len(join_turns(pair.rejected))) for pair in pairs]
    longer = sum(a > b for a, b in sizes)
    share = (longer + sum(a == b for a, b in sizes) / 2) / len(pairs)
    if len(pairs) < FEWEST or 1 - BIASED < share < BIASED:
        return []
    direction = "longer" if share >= BIASED else "shorter"
    num_biased = longer if share >= BIASED else len(pairs) - longer
    accuracy = f"{max(share, 1 - share):.0%}"
    description = f"a judge of length alone, for the {direction} one, would be right in {accuracy}"
    return [("length_bias", num_biased, description)]


def _repeats_prompt(pair: PairExample) -> bool:
    """Returns whether an answer begins with the prompt's last turn, if that has three words."""
    question = pair.prompt[-1].content.strip()
    return len(question.split()) > 2 and any(
        join_turns(answer).strip().startswith(question) for answer in (pair.chosen, pair.rejected)
    )
