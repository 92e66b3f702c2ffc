"""Encoded rows of rerankers: a query followed by its documents.

The pair is encoded as the tokenizer does it, so that sentence-transformers and servers compute the
same scores. A decoder's tokenizer joins two texts without a separator. Its template is therefore
extended by a newline after the query and EOS after the document, and saved with the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ftlevel.data.encoding.encode import split_batches
from ftlevel.data.encoding.row import Encoded
from ftlevel.extras.retrieval.formats import EmbeddingRow

_BATCH = 256
"""Queries whose documents are tokenized together."""


@dataclass(frozen=True)
class RankedRow(Encoded):
    """A query with its documents; `input_ids` concatenates the query and all documents.

    Attributes:
        query: number of leading tokens (query and special tokens), which all documents share.
        sizes: number of tokens of each document, including the special tokens after it.
        relevance: label of each document.
        taught: teacher's score of each document, NaN before it has run; without teacher, the label.
        words: the query and the documents, for a teacher model; empty if there is none.
    """

    has_several_texts = True
    query: int = field(default=0, metadata={"column": "int"})
    sizes: tuple[int, ...] = field(default=(), metadata={"column": "ints"})
    relevance: tuple[float, ...] = field(default=(), metadata={"column": "json"})
    taught: tuple[float, ...] = field(default=(), metadata={"column": "json"})
    words: tuple[str, ...] = field(default=(), metadata={"column": "json"})

    def with_teacher(self, scores: tuple[float, ...]) -> RankedRow:
        """Returns the row with a teacher's `scores` of its documents."""
        return replace(self, taught=scores)

    @property
    def sequences(self) -> Sequence[Encoded]:
        """A sequence per document: query and document, with labels as in `Lists.from_labels`."""
        found, start = [], self.query
        for at, size in enumerate(self.sizes):
            own = slice(start, start + size)
            count = len(self.sizes) if not at else 0
            found.append(
                Encoded(
                    self._part(self.input_ids, own),
                    (float(self.relevance[at]), float(self.taught[at]), float(count)),
                    self.row,
                    {name: self._part(values, own) for name, values in self.extras.items()},
                )
            )
            start += size
        return found

    def _part(self, values: list[int], own: slice) -> list[int]:
        return values[: self.query] + values[own]

    @property
    def group(self) -> bytes:
        """Key of the query, shared by all rows with its documents, for bootstrap intervals."""
        return np.array(self.input_ids[: self.query], dtype=np.int32).tobytes()

    @property
    def supervised(self) -> int:
        return len(self.sizes)

    @property
    def length(self) -> int:
        return self.query + max(self.sizes)

    def truncated(self, limit: int) -> RankedRow:
        """Returns the row cut to sequences of `limit` tokens, at most half of them for the query.

        Texts lose tokens at their end, but a document keeps its last token and the query its last
        two, because they may be special.
        """
        if self.length <= limit:
            return self
        query = min(self.query, max(limit // 2, 3), limit - 1)
        longest = limit - query

        def cut(values: list[int]) -> list[int]:
            result, start = _cut(values[: self.query], query, 2), self.query
            for size in self.sizes:
                result = result + _cut(values[start : start + size], longest, 1)
                start += size
            return result

        ids, extras = cut(self.input_ids), {name: cut(own) for name, own in self.extras.items()}
        sizes = tuple(min(size, longest) for size in self.sizes)
        return replace(self, input_ids=ids, extras=extras, query=query, sizes=sizes)


def _cut(values: list[int], limit: int, num_last: int) -> list[int]:
    if len(values) <= limit:
        return values
    num_last = min(num_last, limit)
    return values[: limit - num_last] + values[len(values) - num_last :]


@dataclass(frozen=True)
class PairEncoder:
    """Callable that encodes queries with documents; it is picklable for worker processes.

    Attributes:
        has_teacher: whether rows keep their texts, for a teacher model that scores them later.
    """

    tokenizer: Any
    has_teacher: bool = False

    def __call__(self, examples: Sequence[EmbeddingRow]) -> list[Encoded]:
        """Returns one row per query, with its documents."""
        return [row for chunk in split_batches(examples, _BATCH) for row in self._encode(chunk)]

    def _encode(self, examples: Sequence[EmbeddingRow]) -> list[Encoded]:
        queries = [e.prompt + e.query for e in examples for _ in e.documents]
        documents = [text for e in examples for text in e.documents]
        encoding = self.tokenizer(queries, documents, verbose=False)
        names = [name for name in encoding if name not in ("input_ids", "attention_mask")]
        rows: list[Encoded] = []
        at = 0
        for example in examples:
            count = len(example.documents)
            untaught = (math.nan,) * count if self.has_teacher else example.labels
            query = next(
                (i for i, part in enumerate(encoding.sequence_ids(at)) if part == 1),
                len(encoding["input_ids"][at]) - 1,  # a document without tokens
            )
            own = range(at, at + count)
            values = {
                name: _join([encoding[name][i] for i in own], query)
                for name in ("input_ids", *names)
            }
            rows.append(
                RankedRow(
                    values.pop("input_ids"),
                    0,
                    example.row,
                    values,
                    query,
                    tuple(len(encoding["input_ids"][i]) - query for i in own),
                    example.labels,
                    example.teacher or untaught,
                    (example.query, *example.documents) if self.has_teacher else (),
                )
            )
            at += count
        return rows


def _join(sequences: Sequence[list[int]], query: int) -> list[int]:
    joined = list(sequences[0][:query])
    for values in sequences:
        joined += values[query:]
    return joined
