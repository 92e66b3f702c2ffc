"""Rows of whole texts, each embedded as one vector, and the distinct texts of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftlevel.data.encoding.encode import Encoded
from ftlevel.task import StepTexts


@dataclass(frozen=True)
class EncodedTexts(Encoded):
    """A query with its documents, two texts with a score, or a text with a class.

    Attributes:
        input_ids: tokens of all texts, one after the other.
        labels: label or score of each document, or the number of the class.
        sizes: number of tokens of each text.
        teacher_scores: a teacher's score of each document; empty without a teacher.
        prompts: number of tokens of the prompt of each text.
        words: the texts themselves, for another model; empty if there is none.
    """

    sizes: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    teacher_scores: tuple[float, ...] = field(default=(), metadata={"column": "json"})
    prompts: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    words: tuple[str, ...] = field(default=(), metadata={"column": "json"})

    @property
    def guide(self) -> Any:
        """Vector of each text by a guide model, or None."""
        return None

    @property
    def branches(self) -> Sequence[Encoded]:
        """One sequence per text, with a dummy label."""
        found, begin = [], 0
        for size in self.sizes:
            found.append(Encoded(self.input_ids[begin : begin + size], 0, self.row))
            begin += size
        return found

    @property
    def length(self) -> int:
        """Number of tokens of the longest text."""
        return max(self.sizes)

    def truncated(self, limit: int) -> Encoded:
        """Return the row with texts of at most `limit` tokens; the last token, an end, is kept."""
        ids: list[int] = []
        for branch in self.branches:
            own = branch.input_ids
            ids += own if len(own) <= limit else [*own[: limit - 1], own[-1]]
        return replace(self, input_ids=ids, sizes=tuple(min(size, limit) for size in self.sizes))


def distinct_texts(rows: Sequence[Any]) -> tuple[list[Encoded], StepTexts]:
    """Return the distinct texts of `rows`, in order of appearance, and the rows as their indices.

    Rows with a negative `row` only fill up a batch and are left out.
    """
    texts: list[Encoded] = []
    known: dict[tuple[int, ...], int] = {}
    indices: list[tuple[int, ...]] = []
    guide: list[Any] = []
    real = [row for row in rows if row.row >= 0]
    for row in real:
        own = []
        for at, branch in enumerate(row.branches):
            key = tuple(branch.input_ids)
            if key not in known:
                known[key] = len(texts)
                texts.append(branch)
                if (vectors := row.guide) is not None:
                    guide.append(vectors[at])
            own.append(known[key])
        indices.append(tuple(own))
    step = StepTexts(
        tuple(indices),
        tuple(tuple(row.labels) for row in real),
        tuple(row.teacher_scores for row in real),
        guide or None,
    )
    return texts or list(rows[0].branches[:1]), step
