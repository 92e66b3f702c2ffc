"""Rows of judged answers: a prompt once, and the answers behind it.

A pair lies in one row, prompt, preferred and rejected answer end to end, so that no cut, shuffle or
micro-batch tears it. What goes through the model are its two branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.sources.computed import Computed

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
