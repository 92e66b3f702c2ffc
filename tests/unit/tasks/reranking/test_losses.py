"""Reranking losses: by hand for two and three documents, and independent of the micro-batches."""

import math

import pytest
import torch

from ftlevel.config.reranking import LOSSES
from ftlevel.tasks.reranking.losses import Lists, count_targets, sum_loss


def lists_of(*rows, teacher=None):
    """Return the lists of rows of labels."""
    labels = []
    for number, row in enumerate(rows):
        for at, label in enumerate(row):
            score = teacher[number][at] if teacher else label
            labels.append((float(label), float(score), float(len(row) * (at == 0))))
    return Lists.from_labels(torch.tensor(labels))


def loss_of(name, logits, *rows, teacher=None, pos_weight=1.0):
    lists = lists_of(*rows, teacher=teacher)
    total = sum_loss(name, torch.tensor(logits), lists, pos_weight)
    return (total / count_targets(name, lists)).item()


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_bce_weighs_relevant_documents():
    by_hand = (-3 * math.log(sigmoid(0.5)) - math.log(1 - sigmoid(-1.0))) / 2
    assert loss_of("bce", [0.5, -1.0], [1, 0], pos_weight=3.0) == pytest.approx(by_hand)


def test_lce_is_cross_entropy_of_each_relevant_document_with_the_irrelevant_ones():
    def against(good, *bad):
        return -math.log(math.exp(good) / (math.exp(good) + sum(map(math.exp, bad))))

    one = against(1.0, 0.5, -2.0)
    assert loss_of("lce", [0.5, 1.0, -2.0], [0, 1, 0]) == pytest.approx(one)
    two = (against(1.0, -2.0) + against(0.5, -2.0)) / 2
    assert loss_of("lce", [0.5, 1.0, -2.0], [1, 1, 0]) == pytest.approx(two)


def test_listnet_compares_two_distributions():
    z, y = [0.3, -0.2], [2.0, 1.0]
    p = [math.exp(v) / sum(map(math.exp, y)) for v in y]
    q = [math.exp(v) / sum(map(math.exp, z)) for v in z]
    by_hand = -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    assert loss_of("listnet", z, y) == pytest.approx(by_hand)


def test_ranknet_averages_over_all_pairs_of_the_step():
    by_hand = [math.log2(1 + math.exp(b - a)) for a, b in [(0.5, 0.1), (2.0, 1.0), (2.0, 3.0)]]
    found = loss_of("ranknet", [0.5, 0.1, 1.0, 2.0, 3.0], [1, 0], [0, 2, 0])
    assert found == pytest.approx(sum(by_hand) / 3)


def test_lambda_weighs_a_pair_by_what_it_changes_in_ndcg():
    """One relevant document at rank 2 of 2: the gain is 1, ranks are 1 apart."""
    lambda_rank = 1 / math.log2(2) - 1 / math.log2(3)
    ndcg_loss2 = 1 / math.log2(2) - 1 / math.log2(3)
    by_hand = (10 * ndcg_loss2 + lambda_rank) * math.log2(1 + math.exp(0.7))
    assert loss_of("lambda", [0.0, 0.7], [1, 0]) == pytest.approx(by_hand)


def test_margin_mse_and_mse_learn_the_scores_of_the_teacher():
    teacher = [[3.0, 1.0, 0.5]]
    found = loss_of("margin-mse", [1.0, 0.0, -1.0], [1, 0, 0], teacher=teacher)
    assert found == pytest.approx(((1 - 2) ** 2 + (2 - 2.5) ** 2) / 2)
    squares = [(1 - 3) ** 2, (0 - 1) ** 2, (-1 - 0.5) ** 2]
    assert loss_of("mse", [1.0, 0.0, -1.0], [1, 0, 0], teacher=teacher) == pytest.approx(
        sum(squares) / 3
    )


ROWS = ([1, 0], [0, 2, 1, 0], [1, 0, 0], [0, 1])
SIZES = [len(row) for row in ROWS]


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_do_not_depend_on_the_micro_batches(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(sum(SIZES), generator=generator, requires_grad=True)
    teacher = [torch.randn(n, generator=generator).tolist() for n in SIZES]
    rows = [[min(label, 1) for label in row] for row in ROWS] if name == "bce" else ROWS
    whole = lists_of(*rows, teacher=teacher)
    (sum_loss(name, logits, whole, 2.0) / count_targets(name, whole)).backward()
    expected, logits.grad = logits.grad.clone(), None
    parts, start = [], 0
    for row, scores in zip(rows, teacher, strict=True):
        own = logits[start : start + len(row)]
        parts.append((own, lists_of(row, teacher=[scores])))
        start += len(row)
    count = sum(count_targets(name, part) for _, part in parts)
    for own, part in parts:
        (sum_loss(name, own, part, 2.0) / count).backward()
    assert torch.allclose(logits.grad, expected, atol=1e-6)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_without_contrast_has_a_finite_gradient(name):
    logits = torch.tensor([0.3, 0.2, 0.1], requires_grad=True)
    sum_loss(name, logits, lists_of([1, 1], [0]), 1.0).backward()
    assert torch.isfinite(logits.grad).all()
