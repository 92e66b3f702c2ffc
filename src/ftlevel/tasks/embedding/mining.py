"""Hard negatives: documents that score high for a query, but below its positives.

A candidate is neither a positive of the query in any row nor the query itself. It is skipped if its
score is above s - m |s|, because such a document is often relevant (NV-Retriever, 2407.15831). Here
s is the score of the row's lowest positive and m the margin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ftlevel.tasks.embedding.formats import EmbeddingRow
from ftlevel.tasks.embedding.retrieval import BLOCK_BYTES, iterate_scores


@dataclass(frozen=True)
class MiningConfig:
    """Settings of mining: negatives per row, margin, first and last rank (from 1) of negatives."""

    negatives: int
    relative_margin: float
    ranks: tuple[int, int] = (1, 100)
    at_random: bool = False
    seed: int = 0


@dataclass(frozen=True)
class MinedRow:
    """Negatives of a row as corpus indices, best first, with scores of positives and negatives.

    `skipped` is the number of documents whose score is too high for a negative.
    """

    negatives: tuple[int, ...]
    positive_scores: tuple[float, ...]
    negative_scores: tuple[float, ...]
    skipped: int


class Corpus:
    """Distinct documents `texts` to select negatives from, and text -> index (`positions`)."""

    def __init__(self, rows: Sequence[EmbeddingRow], documents: Sequence[str] = ()) -> None:
        own = (text for row in rows for text in row.documents)
        self.texts = list(dict.fromkeys([*own, *documents]))
        self.positions: Mapping[str, int] = {text: at for at, text in enumerate(self.texts)}
        self._positives: dict[str, set[int]] = {}
        for row in rows:
            positives = self._positives.setdefault(row.query, set())
            positives |= {self.positions[text] for text in row.positives}
            if row.query in self.positions:
                positives.add(self.positions[row.query])

    def excluded(self, query: str) -> list[int]:
        """Returns indices of the query's positives in any row, and of the query as a document."""
        return sorted(self._positives[query])


def mine(
    rows: Sequence[EmbeddingRow],
    corpus: Corpus,
    queries: torch.Tensor,
    documents: torch.Tensor,
    config: MiningConfig,
    *,
    similarity: str = "cosine",
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[MinedRow]:
    """Yields the mined negatives of each row; the search is exact, in blocks of queries.

    `queries` `(rows, dims)` and `documents` `(documents, dims)` are embeddings; `similarity` is
    cosine or dot. The scores of a block take `block_bytes` of memory.
    """
    generator = np.random.default_rng(config.seed)
    first, last = config.ranks
    for start, block in iterate_scores(queries, documents, similarity, block_bytes):
        for number, scores in enumerate(block):
            row = rows[start + number]
            positives = [corpus.positions[text] for text in row.positives]
            own = scores[positives].tolist()
            limit = min(own) - config.relative_margin * abs(min(own))
            scores[corpus.excluded(row.query)] = -torch.inf
            above = scores > limit
            scores[above] = -torch.inf
            found = scores.topk(min(last, len(scores)))
            num_finite = int(torch.isfinite(found.values).sum())
            window = np.arange(first - 1, num_finite)
            if config.at_random and len(window) > config.negatives:
                window = np.sort(generator.choice(window, config.negatives, replace=False))
            window = window[: config.negatives]
            yield MinedRow(
                tuple(found.indices[window].tolist()),
                tuple(own),
                tuple(found.values[window].tolist()),
                int(above.sum()),
            )
