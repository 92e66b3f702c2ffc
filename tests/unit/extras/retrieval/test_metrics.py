"""Tests of retrieval metrics: by hand, over all orders of ties, and against scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from ftlevel.extras.retrieval.metrics import (
    METRICS,
    average_precision,
    iterate_scores,
    rank_relevant,
    score_queries,
    score_ranks,
    score_retrieval,
    spearman,
)


def compute_reference(gains):
    """Return the metrics of ordered documents, as defined by sentence-transformers' evaluators."""
    total = sum(gains)

    def dcg(values):
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(values[:10], 1))

    precisions = [sum(gains[:rank]) / rank for rank, gain in enumerate(gains[:100], 1) if gain]
    return {
        "ndcg@10": dcg(gains) / dcg([1] * total),
        "mrr@10": next((1 / rank for rank, gain in enumerate(gains[:10], 1) if gain), 0),
        "recall@1": sum(gains[:1]) / total,
        "recall@10": sum(gains[:10]) / total,
        "recall@100": sum(gains[:100]) / total,
        "map@100": sum(precisions) / min(100, total),
    }


def measure(scores, relevant):
    return score_ranks(rank_relevant(np.array(scores, dtype=np.float32), relevant))


def test_metrics_of_one_relevant_document_at_rank_three():
    assert measure([0.9, 0.1, 0.5, 0.7], [2]) == {
        "ndcg@10": 0.5,
        "mrr@10": pytest.approx(1 / 3),
        "recall@1": 0,
        "recall@10": 1,
        "recall@100": 1,
        "map@100": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize("seed", range(5))
def test_metrics_without_ties_match_reference(seed):
    generator = np.random.default_rng(seed)
    scores = generator.permutation(250)
    relevant = generator.choice(250, [1, 3, 12, 120, 250][seed], replace=False)
    gains = [int(index in set(relevant.tolist())) for index in np.argsort(-scores)]
    assert measure(scores, relevant) == pytest.approx(compute_reference(gains), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "relevant"),
    [
        ([1, 1, 1], [0]),
        ([1, 1, 1, 0, 0], [0, 3]),
        ([2, 1, 1, 1, 0], [1, 2, 4]),
        ([1, 1, 1, 1, 1, 1], [2, 3, 5]),
        ([3, 3, 2, 2, 2, 1], [0, 4, 5]),
    ],
)
def test_ties_give_mean_over_all_orders(scores, relevant):
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    metrics = [compute_reference([int(index in relevant) for index in order]) for order in orders]
    mean = {name: np.mean([values[name] for values in metrics]) for name in METRICS}
    assert measure(scores, relevant) == pytest.approx(mean, abs=1e-12)


def test_ties_across_cutoff_give_mean_over_random_orders():
    generator = np.random.default_rng(0)
    scores = np.array([3.0] * 4 + [2.0] * 20 + [1.0] * 130)
    relevant = [1, 5, 6, 30, 100]
    mean = dict.fromkeys(METRICS, 0.0)
    for _ in range(4000):
        order = np.lexsort((generator.random(len(scores)), -scores))
        for name, value in compute_reference([int(index in relevant) for index in order]).items():
            mean[name] += value / 4000
    assert measure(scores, relevant) == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("highest", [1, 3])
def test_ndcg_with_ties_matches_scikit_learn(highest):
    generator = np.random.default_rng(3)
    for _ in range(20):
        scores = generator.integers(0, 4, 30).astype(float)
        gains = generator.integers(0, highest + 1, 30)
        gains[0] = 1
        relevant = {index: float(gains[index]) for index in np.flatnonzero(gains)}
        actual = measure(scores, relevant)
        assert actual["ndcg@10"] == pytest.approx(ndcg_score([gains], [scores], k=10), abs=1e-9)
        binary = measure(scores, [*relevant])
        others = set(METRICS) - {"ndcg@10"}
        assert {name: actual[name] for name in others} == {name: binary[name] for name in others}


def test_document_order_has_no_effect():
    generator = np.random.default_rng(1)
    scores, relevant = generator.integers(0, 9, 60), generator.choice(60, 7, replace=False)
    order = generator.permutation(60)
    reordered = np.argsort(order)[relevant]
    assert measure(scores, relevant) == pytest.approx(measure(scores[order], reordered), abs=1e-12)


def test_query_without_relevant_documents_is_skipped():
    ranks = [rank_relevant(np.array([1.0, 0.0]), relevant) for relevant in ([0], [], [1])]
    assert score_queries(ranks).values["recall@1"].tolist() == [1, 0]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_search_matches_full_sort_for_any_block_size(similarity):
    generator = torch.Generator().manual_seed(0)
    queries, corpus = (torch.randn(n, 8, generator=generator).double() for n in (13, 57))
    similarities = queries @ corpus.T
    if similarity == "cosine":
        similarities = similarities / queries.norm(dim=1)[:, None] / corpus.norm(dim=1)
    best = similarities.argsort(dim=1, descending=True)
    for size in (1, 1000, 1 << 20):
        blocks = iterate_scores(queries, corpus, similarity, size)
        found = torch.cat([scores for _, scores in blocks]).topk(5)
        assert found.indices.tolist() == best[:, :5].tolist()
        assert np.allclose(found.values, similarities.gather(1, best[:, :5]), atol=1e-6)
    relevant = [[int(row[0]), int(row[30])] for row in best]
    result = score_retrieval(queries, corpus, relevant, similarity=similarity, block_bytes=1000)
    assert result.means["recall@10"] == 0.5
    assert result.means["recall@100"] == 1


def test_score_blocks_stay_within_byte_limit():
    queries, corpus = torch.randn(100, 4), torch.randn(1000, 4)
    sizes = [part.numel() * 4 for _, part in iterate_scores(queries, corpus, "dot", 40_000)]
    assert max(sizes) <= 40_000
    assert sum(sizes) == 400_000


def test_resampled_means_are_reproducible():
    ranks = [rank_relevant(np.array([2.0, 1.0]), [index % 2]) for index in range(50)]
    scores = score_queries(ranks)
    draws = scores.resample(200, 7)
    assert draws["recall@1"].mean() == pytest.approx(0.5, abs=0.02)
    assert draws["recall@1"].std() == pytest.approx(0.5 / 50**0.5, rel=0.2)
    assert (scores.resample(200, 7)["mrr@10"] == draws["mrr@10"]).all()


def test_correlation_and_precision_by_hand():
    assert spearman([0.1, 0.2, 0.9], [1, 2, 3]) == pytest.approx(1)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(3**0.5 / 2)
    assert average_precision([0.9, 0.8, 0.7], [1, 0, 1]) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([1, 1], [0, 1]) == 0.5
