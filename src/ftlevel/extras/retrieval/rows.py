"""Rows of embedding models: a query with documents, a scored pair, or a text with a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

from ftlevel.data.encoding.row import Encoded


@dataclass(frozen=True)
class EncodedText(Encoded):
    """One text to embed; its first `unpooled` tokens are not pooled; `ends`: with EOS or SEP."""

    unpooled: int = field(default=0, metadata={"column": "int"})
    ends: int = field(default=1, metadata={"column": "int"})

    @property
    def key(self) -> tuple[int, ...]:
        """Key of the text, from its tokens and `unpooled`; equal keys have equal embeddings."""
        return (self.unpooled, *self.input_ids)

    def truncated(self, limit: int) -> EncodedText:
        """Returns the text with at most `limit` tokens; EOS or SEP at its end is kept."""
        ids = self.input_ids
        if len(ids) <= limit:
            return self
        unpooled = min(self.unpooled, limit - 1)
        ids = [*ids[: limit - 1], ids[-1 if self.ends else limit - 1]]
        return replace(self, input_ids=ids, unpooled=unpooled)


@dataclass(frozen=True)
class EncodedTexts(Encoded):
    """Row of an embedding model: a query with documents, a scored pair, or a text with a class.

    Attributes:
        input_ids: tokens of all texts, one after the other.
        labels: label or score of each document, or the class index.
        sizes: number of tokens of each text.
        teacher_scores: a teacher's score of each document; empty without a teacher.
        prompts: number of tokens of the prompt of each text.
        words: the texts as strings, for a guide or teacher model; empty if there is none.
        unpooled: number of leading tokens of each text left out of pooling; empty if none are.
        ends: whether the texts end with EOS or SEP.
    """

    has_several_texts = True
    guide: ClassVar[Any] = None
    sizes: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    teacher_scores: tuple[float, ...] = field(default=(), metadata={"column": "json"})
    prompts: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    words: tuple[str, ...] = field(default=(), metadata={"column": "json"})
    unpooled: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    ends: int = field(default=1, metadata={"column": "int"})

    def with_teacher(self, scores: tuple[float, ...]) -> EncodedTexts:
        """Returns the row with a teacher's `scores` of its documents."""
        return replace(self, teacher_scores=scores)

    @property
    def sequences(self) -> Sequence[EncodedText]:
        """One sequence per text, with a dummy label."""
        spans = pairwise(accumulate(self.sizes, initial=0))
        return [
            EncodedText(self.input_ids[a:b], 0, self.row, {}, min(skipped, b - a - 1), self.ends)
            for (a, b), skipped in zip(spans, self.unpooled or (0,) * len(self.sizes), strict=True)
        ]

    @property
    def length(self) -> int:
        """Number of tokens of the longest text."""
        return max(self.sizes)

    def truncated(self, limit: int) -> Encoded:
        """Returns the row, each text cut to `limit` tokens; EOS or SEP at its end is kept."""
        ids = [token for text in self.sequences for token in text.truncated(limit).input_ids]
        return replace(self, input_ids=ids, sizes=tuple(min(size, limit) for size in self.sizes))


@dataclass(frozen=True)
class StepTexts:
    """Indices of the texts of each row of an optimizer step; rows may share texts.

    Attributes:
        texts: per row, the indices of its texts: the query, then the documents.
        labels: per row, the labels of its documents or the class of the text.
        teacher: per row, a teacher's score of each document; empty without a teacher.
        guide: a guide model's float32 embedding of each distinct text, or None.
        keys: a key of each distinct text, by which `join` finds texts of several steps.
    """

    texts: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[float, ...], ...]
    teacher: tuple[tuple[float, ...], ...] = ()
    guide: Sequence[Any] | None = None
    keys: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: slice) -> StepTexts:
        """Returns only the rows at the indices `rows`; text indices stay the same."""
        return replace(
            self, texts=self.texts[rows], labels=self.labels[rows], teacher=self.teacher[rows]
        )

    @classmethod
    def join(cls, steps: Sequence[StepTexts]) -> StepTexts:
        """Returns the rows of all `steps`; their texts, in this order, have consecutive indices.

        A text that occurs several times has the index of its first occurrence.
        """
        guides = [vector for step in steps for vector in step.guide or ()]
        first: dict[Any, int] = {}
        texts: list[tuple[int, ...]] = []
        count = 0
        for step in steps:
            own = [first.setdefault(key, at) for at, key in enumerate(step.keys, count)]
            texts += [tuple(own[index] for index in indices) for indices in step.texts]
            count += len(own)
        return cls(
            tuple(texts),
            tuple(own for step in steps for own in step.labels),
            tuple(own for step in steps for own in step.teacher),
            guides or None,
        )


def distinct_texts(rows: Sequence[Any]) -> tuple[list[EncodedText], StepTexts]:
    """Returns the distinct texts of `rows`, and a `StepTexts` with each row's indices into them.

    Rows with a negative index `row`, which only fill up a batch, are left out.
    """
    texts: list[EncodedText] = []
    index_of: dict[tuple[int, ...], int] = {}
    indices: list[tuple[int, ...]] = []
    guide: list[Any] = []
    real = [row for row in rows if row.row >= 0]
    for row in real:
        sequences = row.sequences
        keys = [sequence.key for sequence in sequences]
        for at, (key, sequence) in enumerate(zip(keys, sequences, strict=True)):
            if key not in index_of:
                index_of[key] = len(texts)
                texts.append(sequence)
                if (vectors := row.guide) is not None:
                    guide.append(vectors[at])
        indices.append(tuple(map(index_of.__getitem__, keys)))
    labels = tuple(tuple(row.labels) for row in real)
    scores = tuple(row.teacher_scores for row in real)
    texts = texts or list(rows[0].sequences[:1])
    text_keys = tuple(text.key for text in texts)
    return texts, StepTexts(tuple(indices), labels, scores, guide or None, text_keys)


def add_texts(texts: list[EncodedText], more: Sequence[EncodedText]) -> list[int]:
    """Add the texts of `more` that `texts` (modified) lacks; returns their indices in `texts`."""
    index_of = {text.key: at for at, text in enumerate(texts)}
    indices = []
    for text in more:
        index = index_of.setdefault(text.key, len(texts))
        if index == len(texts):
            texts.append(text)
        indices.append(index)
    return indices
