"""Rows of whole texts, each embedded as one vector, and the distinct texts of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

from ftlevel.data.encoding.encode import Encoded
from ftlevel.task import StepTexts


@dataclass(frozen=True)
class EncodedText(Encoded):
    """One text; its first `unpooled` tokens, those of its prompt, are left out of pooling."""

    unpooled: int = field(default=0, metadata={"column": "int"})


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
        unpooled: number of first tokens of each text that are not pooled; empty if all are.
    """

    sizes: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    teacher_scores: tuple[float, ...] = field(default=(), metadata={"column": "json"})
    prompts: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    words: tuple[str, ...] = field(default=(), metadata={"column": "json"})
    unpooled: tuple[int, ...] = field(default=(), metadata={"column": "ints"})

    @property
    def guide(self) -> Any:
        """Vector of each text by a guide model, or None."""
        return None

    @property
    def branches(self) -> Sequence[EncodedText]:
        """One sequence per text, with a dummy label."""
        spans = pairwise(accumulate(self.sizes, initial=0))
        unpooled = self.unpooled or (0,) * len(self.sizes)
        return [
            EncodedText(self.input_ids[a:b], 0, self.row, unpooled=min(skipped, b - a - 1))
            for (a, b), skipped in zip(spans, unpooled, strict=True)
        ]

    @property
    def length(self) -> int:
        """Number of tokens of the longest text."""
        return max(self.sizes)

    def truncated(self, limit: int) -> Encoded:
        """Return the row with texts of at most `limit` tokens; the last token, an end, is kept."""
        ids: list[int] = []
        for branch in self.branches:
            text = branch.input_ids
            ids += text if len(text) <= limit else [*text[: limit - 1], text[-1]]
        return replace(self, input_ids=ids, sizes=tuple(min(size, limit) for size in self.sizes))


def distinct_texts(rows: Sequence[Any]) -> tuple[list[EncodedText], StepTexts]:
    """Return the distinct texts of `rows`, in order of appearance, and the rows as their indices.

    Rows with a negative `row` only fill up a batch and are left out.
    """
    texts: list[EncodedText] = []
    index_of: dict[tuple[int, ...], int] = {}
    indices: list[tuple[int, ...]] = []
    guide: list[Any] = []
    real = [row for row in rows if row.row >= 0]
    for row in real:
        branches = row.branches
        keys = [(branch.unpooled, *branch.input_ids) for branch in branches]
        for at, (key, branch) in enumerate(zip(keys, branches, strict=True)):
            if key not in index_of:
                index_of[key] = len(texts)
                texts.append(branch)
                if (vectors := row.guide) is not None:
                    guide.append(vectors[at])
        indices.append(tuple(map(index_of.__getitem__, keys)))
    labels = tuple(tuple(row.labels) for row in real)
    scores = tuple(row.teacher_scores for row in real)
    step = StepTexts(tuple(indices), labels, scores, guide or None)
    return texts or list(rows[0].branches[:1]), step
