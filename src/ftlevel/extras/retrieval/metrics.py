"""Retrieval metrics and exact search.

Definitions are those of sentence-transformers' evaluators: discount 1 / log2(rank + 1), MAP@k over
min(k, relevant documents); queries without relevant documents are left out. Gains of nDCG are the
grades, as in trec_eval, ranx and MTEB. Documents of equal score are in random order. A metric is
its expected value over these orders (McSherry and Najork, 2008), so it does not depend on the order
or the names of the documents. With s documents above a group of g equal scores, r of them relevant
with grades of sum G, and H relevant ones above:

    E[gain at a rank of the group]              = G / g
    P[first relevant one is j-th of the group]  = C(g - j, r - 1) / C(g, r)
    E[hit · relevant ones up to rank s + j]     = r / g · (H + 1 + (j - 1)(r - 1) / (g - 1))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

METRICS = ("ndcg@10", "mrr@10", "recall@1", "recall@10", "recall@100", "map@100")
DEEPEST = 100
BLOCK_BYTES = 64 << 20
"""Bytes of the scores of one block of queries."""


@dataclass(frozen=True)
class QueryRanks:
    """Ranks and grades of the relevant documents of a query; arrays `(relevant,)`.

    For each of them, `above` is the number of documents with a higher score, and `equal` the number
    with the same score, itself included.
    """

    above: np.ndarray
    equal: np.ndarray
    grades: np.ndarray


def rank_relevant(scores: np.ndarray, relevant: Mapping[int, float] | Sequence[int]) -> QueryRanks:
    """Returns the ranks of documents `relevant`: indices of `scores`, or index → grade (else 1)."""
    own = scores[np.array([*relevant], dtype=np.int64)]
    order = np.sort(scores)
    grades = [*relevant.values()] if isinstance(relevant, Mapping) else np.ones(len(own))
    upper = np.searchsorted(order, own, side="right")
    equal = upper - np.searchsorted(order, own, side="left")
    return QueryRanks(len(scores) - upper, equal, np.asarray(grades, dtype=np.float64))


def score_ranks(ranks: QueryRanks, deepest: int = DEEPEST) -> dict[str, float]:
    """Returns the metrics of one query with at least one relevant document.

    Documents after rank `deepest` (at least 10) do not count; metrics @100 are @`deepest`.
    """
    depth = np.arange(1, deepest + 1)
    gain, relevance, precision = np.zeros((3, deepest))
    reciprocal, hits = 0.0, 0
    starts, first, group_ids, sizes = np.unique(ranks.above, True, True, True)
    totals = np.bincount(group_ids, ranks.grades)
    for start, size, found, total in zip(starts, ranks.equal[first], sizes, totals, strict=True):
        group = int(min(size, max(deepest - start, 0)))
        own, position = slice(start, start + group), np.arange(group)
        gain[own], relevance[own] = total / size, found / size
        others = position * (found - 1) / max(size - 1, 1)
        precision[own] = found / size * (hits + 1 + others) / depth[own]
        if not hits:
            reciprocal = _expected_reciprocal(int(start), int(size), int(found), 10)
        hits += int(found)
    discount, ideal = 1 / np.log2(depth[:10] + 1), np.sort(ranks.grades)[:-11:-1]
    return {
        "ndcg@10": float(gain[:10] @ discount / (ideal * discount[: len(ideal)]).sum()),
        "mrr@10": reciprocal,
        "recall@1": float(relevance[0] / hits),
        "recall@10": float(relevance[:10].sum() / hits),
        "recall@100": float(relevance.sum() / hits),
        "map@100": float(precision.sum() / min(deepest, hits)),
    }


def _expected_reciprocal(start: int, size: int, found: int, deepest: int) -> float:
    """Returns E[1 / rank] of the first of `found` relevant documents in a tie of `size`.

    The tie begins after `start` documents; ranks above `deepest` count as 0.
    """
    chance, total = found / size, 0.0
    for position in range(min(size - found + 1, deepest - start)):
        total += chance / (start + position + 1)
        chance *= (size - position - found) / max(size - position - 1, 1)
    return total


@dataclass(frozen=True)
class RetrievalScores:
    """Metrics of a search: name -> values `(queries,)`."""

    values: Mapping[str, np.ndarray]

    @property
    def means(self) -> dict[str, float]:
        """The mean of each metric over queries."""
        return {name: float(values.mean()) for name, values in self.values.items()}

    def resample(self, num_samples: int, seed: int) -> dict[str, np.ndarray]:
        """Returns metric -> means (num_samples,) of bootstrap draws of the queries.

        The same seed draws the same queries, so that means of two models can be subtracted.
        """
        size = len(next(iter(self.values.values())))
        generator = np.random.default_rng(seed)
        picks = [generator.integers(0, size, size) for _ in range(num_samples)]
        return {
            name: np.array([values[pick].mean() for pick in picks])
            for name, values in self.values.items()
        }


def score_queries(ranks: Sequence[QueryRanks]) -> RetrievalScores:
    """Returns the metrics of each query that has a relevant document."""
    rows = [score_ranks(each) for each in ranks if len(each.above)]
    return RetrievalScores({name: np.array([row[name] for row in rows]) for name in METRICS})


def score_retrieval(
    queries: torch.Tensor,
    corpus: torch.Tensor,
    relevant: Sequence[Mapping[int, float] | Sequence[int]],
    *,
    similarity: str,
    block_bytes: int = BLOCK_BYTES,
) -> RetrievalScores:
    """Returns the metrics of a search for each of the queries among all documents.

    `queries` `(queries, dims)` and `corpus` `(documents, dims)` are embeddings; `relevant` has each
    query's relevant documents: corpus indices, or index → grade. `similarity` is cosine or dot. The
    scores of a block of queries take `block_bytes` of memory.
    """
    blocks = iterate_scores(queries, corpus, similarity, block_bytes)
    lines = (line for _, scores in blocks for line in scores.numpy())
    return score_queries([*map(rank_relevant, lines, relevant)])


def iterate_scores(
    queries: torch.Tensor, corpus: torch.Tensor, similarity: str, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields each block's first query index, and its float32 scores `(queries, documents)`."""
    queries, corpus = queries.float().cpu(), corpus.float().cpu()
    if similarity == "cosine":
        from torch.nn import functional

        queries, corpus = functional.normalize(queries), functional.normalize(corpus)
    height = max(1, block_bytes // (4 * max(len(corpus), 1)))
    turned = corpus.T
    for start in range(0, len(queries), height):
        yield start, queries[start : start + height] @ turned


def spearman(scores: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray) -> float:
    """Returns the Spearman correlation, with average ranks for equal values."""
    from scipy.stats import spearmanr

    return float(spearmanr(scores, labels)[0])


def average_precision(
    scores: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray
) -> float:
    """Returns the average precision of labels 0 and 1, with one threshold for equal scores."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(np.asarray(labels) > 0, scores))


def resampled_precision(
    scores: np.ndarray, labels: np.ndarray, owners: np.ndarray
) -> Callable[[np.ndarray], float | None]:
    """Returns a function from the draws of each owner, `(owners,)`, to the average precision.

    Pair i belongs to owner `owners[i]` and is drawn with it. The function returns None if the drawn
    labels or scores are all equal.
    """
    order = np.argsort(-scores, kind="stable")
    scores, owners = scores[order], owners[order]
    positives = np.flatnonzero(labels[order] > 0)
    is_last = np.diff(scores[positives], append=np.nan) != 0  # of the positives with its score
    ends = np.searchsorted(-scores, -scores[positives[is_last]], side="right") - 1

    def compute(counts: np.ndarray) -> float | None:
        own = counts[owners]
        totals, hits = own.cumsum(), own[positives].cumsum()
        if not len(hits) or hits[-1] in (0, totals[-1]):
            return None
        first, last = np.searchsorted(totals, (1, totals[-1]))
        if scores[first] == scores[last]:
            return None
        hits = hits[is_last]
        precision = hits / np.maximum(totals[ends], 1)
        return float(np.diff(hits, prepend=0) @ precision / hits[-1])

    return compute
