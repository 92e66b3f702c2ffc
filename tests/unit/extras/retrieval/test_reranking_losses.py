"""Tests of reranking losses: by hand for small lists, and independent of micro-batches."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score

from ftlevel.extras.retrieval.config import RERANKING_LOSSES, RerankingConfig
from ftlevel.extras.retrieval.formats import EmbeddingRow
from ftlevel.extras.retrieval.reranking import resolve_loss
from ftlevel.extras.retrieval.reranking_losses import CandidateGroup, Lists, count_targets, sum_loss


def test_main_metric_is_defined_for_the_labels():
    grades = [EmbeddingRow("q", i, ("a", "b"), (2.0, 1.0)) for i in range(2)]
    single = [EmbeddingRow("q", i, ("a",), (float(i),)) for i in range(2)]
    config = RerankingConfig(loss="mse")
    headlines = [resolve_loss(config, rows, None)["headline"] for rows in (grades, single)]
    assert headlines == ["spearman", "ndcg@10"]


def test_map_counts_documents_after_rank_100():
    """MAP@100 of a list of 200 would be 0."""
    scores = np.random.default_rng(0).permutation(200).astype(float)
    labels = (scores < 60).astype(float)
    found = CandidateGroup(scores.tolist(), labels.tolist()).metrics
    assert found["map"] == pytest.approx(average_precision_score(labels, scores))
    assert found["mrr@10"] == 0


def test_ndcg_of_grades_matches_scikit_learn():
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = generator.permutation(30) / 30, generator.integers(0, 4, 30) / 2
        found = CandidateGroup(scores.tolist(), labels.tolist()).metrics
        assert found["ndcg@10"] == pytest.approx(ndcg_score([labels], [scores], k=10))


def create_lists(*rows, teacher=None):
    """Return `Lists` of rows of labels."""
    labels = []
    for row_index, row in enumerate(rows):
        for position, label in enumerate(row):
            score = teacher[row_index][position] if teacher else label
            labels.append((float(label), float(score), float(len(row) * (position == 0))))
    return Lists.from_labels(torch.tensor(labels))


def compute_loss(name, logits, *rows, teacher=None, pos_weight=1.0):
    lists = create_lists(*rows, teacher=teacher)
    total = sum_loss(name, torch.tensor(logits), lists, pos_weight)
    return (total / count_targets(name, lists)).item()


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_bce_weights_relevant_documents():
    expected = (-3 * math.log(sigmoid(0.5)) - math.log(1 - sigmoid(-1.0))) / 2
    assert compute_loss("bce", [0.5, -1.0], [1, 0], pos_weight=3.0) == pytest.approx(expected)


def test_lce_matches_formula():
    def cross_entropy(positive, *negatives):
        return -math.log(math.exp(positive) / (math.exp(positive) + sum(map(math.exp, negatives))))

    one_relevant = cross_entropy(1.0, 0.5, -2.0)
    assert compute_loss("lce", [0.5, 1.0, -2.0], [0, 1, 0]) == pytest.approx(one_relevant)
    two_relevant = (cross_entropy(1.0, -2.0) + cross_entropy(0.5, -2.0)) / 2
    assert compute_loss("lce", [0.5, 1.0, -2.0], [1, 1, 0]) == pytest.approx(two_relevant)


def test_listnet_matches_formula():
    z, y = [0.3, -0.2], [2.0, 1.0]
    p = [math.exp(v) / sum(map(math.exp, y)) for v in y]
    q = [math.exp(v) / sum(map(math.exp, z)) for v in z]
    expected = -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    assert compute_loss("listnet", z, y) == pytest.approx(expected)


def test_ranknet_averages_over_pairs_of_step():
    expected = [math.log2(1 + math.exp(b - a)) for a, b in [(0.5, 0.1), (2.0, 1.0), (2.0, 3.0)]]
    actual = compute_loss("ranknet", [0.5, 0.1, 1.0, 2.0, 3.0], [1, 0], [0, 2, 0])
    assert actual == pytest.approx(sum(expected) / 3)


def test_lambda_loss_weights_pair_by_ndcg_change():
    """One relevant document at rank 2 of 2: the gain is 1, and ranks differ by 1."""
    lambda_rank = 1 / math.log2(2) - 1 / math.log2(3)
    ndcg_loss2 = 1 / math.log2(2) - 1 / math.log2(3)
    expected = (10 * ndcg_loss2 + lambda_rank) * math.log2(1 + math.exp(0.7))
    assert compute_loss("lambda", [0.0, 0.7], [1, 0]) == pytest.approx(expected)


def test_margin_mse_and_mse_match_formulas():
    teacher = [[3.0, 1.0, 0.5]]
    actual = compute_loss("margin-mse", [1.0, 0.0, -1.0], [1, 0, 0], teacher=teacher)
    assert actual == pytest.approx(((1 - 2) ** 2 + (2 - 2.5) ** 2) / 2)
    squares = [(1 - 3) ** 2, (0 - 1) ** 2, (-1 - 0.5) ** 2]
    assert compute_loss("mse", [1.0, 0.0, -1.0], [1, 0, 0], teacher=teacher) == pytest.approx(
        sum(squares) / 3
    )


ROWS = ([1, 0], [0, 2, 1, 0], [1, 0, 0], [0, 1])
SIZES = [len(row) for row in ROWS]


@pytest.mark.parametrize("name", RERANKING_LOSSES)
def test_gradients_do_not_depend_on_micro_batches(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(sum(SIZES), generator=generator, requires_grad=True)
    teacher = [torch.randn(n, generator=generator).tolist() for n in SIZES]
    rows = [[min(label, 1) for label in row] for row in ROWS] if name == "bce" else ROWS
    full = create_lists(*rows, teacher=teacher)
    (sum_loss(name, logits, full, 2.0) / count_targets(name, full)).backward()
    expected, logits.grad = logits.grad.clone(), None
    micro_batches, start = [], 0
    for row, scores in zip(rows, teacher, strict=True):
        row_logits = logits[start : start + len(row)]
        micro_batches.append((row_logits, create_lists(row, teacher=[scores])))
        start += len(row)
    count = sum(count_targets(name, lists) for _, lists in micro_batches)
    for row_logits, lists in micro_batches:
        (sum_loss(name, row_logits, lists, 2.0) / count).backward()
    assert torch.allclose(logits.grad, expected, atol=1e-6)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("name", RERANKING_LOSSES)
def test_list_without_contrast_has_finite_gradient(name):
    logits = torch.tensor([0.3, 0.2, 0.1], requires_grad=True)
    sum_loss(name, logits, create_lists([1, 1], [0]), 1.0).backward()
    assert torch.isfinite(logits.grad).all()
