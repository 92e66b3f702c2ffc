"""Tests of weighted and focal losses against torch, scikit-learn and formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from ftlevel.data.encoding.row import Encoded
from ftlevel.objectives import Objective, TrainingLoss
from ftlevel.tasks import TASKS

WEIGHTS = (0.25, 3.0, 1.5)
MULTI_LABEL = {"problem_type": "multi_label_classification"}


def compute_step_loss(
    objective: Objective, logits: Any, labels: Any, loss: TrainingLoss
) -> torch.Tensor:
    """Return the loss of a step computed in two micro-batches."""
    micro_batches = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    mask = torch.ones(3, 5)
    total = sum(
        objective.training_sum(part_logits, part_labels, mask, loss)
        for part_logits, part_labels in micro_batches
    )
    count = sum(objective.training_count(part_labels, loss) for _, part_labels in micro_batches)
    return total / count  # type: ignore[operator,return-value]


def build_sequence_inputs() -> tuple[Objective, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    objective = TASKS["text-classification"].create_objective("encoder", {})
    return objective, torch.randn(7, 3, generator=generator), torch.tensor([0, 0, 1, 2, 0, 1, 0])


def build_token_inputs() -> tuple[Objective, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (6, 5), generator=generator)
    labels[labels.cumsum(1) % 2 == 0] = -100
    objective = TASKS["token-classification"].create_objective("encoder", {"labels": "abc"})
    return objective, torch.randn(6, 5, 3, generator=generator), labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("build_inputs", [build_sequence_inputs, build_token_inputs])
def test_class_weights_match_torch(build_inputs, smoothing):
    objective, logits, labels = build_inputs()
    reference = nn.CrossEntropyLoss(torch.tensor(WEIGHTS), label_smoothing=smoothing)
    expected = reference(logits.reshape(-1, 3), labels.flatten())
    actual = compute_step_loss(objective, logits, labels, TrainingLoss(smoothing, WEIGHTS))
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    assert compute_step_loss(objective, logits, labels, TrainingLoss(smoothing)) != pytest.approx(
        actual
    )


@pytest.mark.parametrize("weights", [(), WEIGHTS])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("build_inputs", [build_sequence_inputs, build_token_inputs])
def test_focal_loss_matches_formula(build_inputs, gamma, weights):
    objective, logits, labels = build_inputs()
    losses, total = [], 0.0
    for row_logits, label in zip(logits.reshape(-1, 3), labels.flatten().tolist(), strict=True):
        if label == -100:
            continue
        p, alpha = torch.softmax(row_logits, 0)[label], (weights or (1.0, 1.0, 1.0))[label]
        losses.append(-alpha * (1 - p) ** gamma * torch.log(p))
        total += alpha
    actual = compute_step_loss(objective, logits, labels, TrainingLoss(0.0, weights, gamma))
    assert actual.item() == pytest.approx(sum(losses).item() / total, rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("weights", [(), WEIGHTS])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_multi_label_focal_loss_matches_formula(gamma, weights):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 3, generator=generator)
    labels = torch.randint(0, 2, (6, 3), generator=generator).float()
    objective = TASKS["text-classification"].create_objective("encoder", MULTI_LABEL)
    positive_weight = torch.tensor(weights or (1.0, 1.0, 1.0))
    p = logits.sigmoid()
    positive, negative = (1 - p) ** gamma * p.log(), p**gamma * (1 - p).log()
    expected = -(positive_weight * labels * positive + (1 - labels) * negative).mean()
    if not gamma:
        torch.testing.assert_close(
            nn.BCEWithLogitsLoss(pos_weight=positive_weight)(logits, labels), expected
        )
    actual = compute_step_loss(objective, logits, labels, TrainingLoss(0.0, weights, gamma))
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


def test_focal_loss_gradient_is_finite_at_certainty():
    objective, _, _ = build_sequence_inputs()
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = TrainingLoss(focal_gamma=0.5)
    objective.training_sum(logits, torch.tensor([0]), torch.ones(1, 1), loss).backward()
    assert logits.grad.isfinite().all()


def test_balanced_weights_match_scikit_learn():
    classes, _, labels = build_sequence_inputs()
    rows = [Encoded([5], label, 0) for label in labels.tolist()]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert classes.balance(rows, 3) == pytest.approx(tuple(expected))
    assert classes.balance(rows, 4) == pytest.approx(
        (*expected, 1.0)
    )  # no rows of the fourth class
    tags, _, labels = build_token_inputs()
    rows = [Encoded([5] * 5, tag_labels, 0) for tag_labels in labels.tolist()]
    true = labels[labels != -100].numpy()
    expected = compute_class_weight("balanced", classes=np.arange(3), y=true)
    assert tags.balance(rows, 3) == pytest.approx(tuple(expected))


def test_balanced_weights_of_multi_label():
    objective = TASKS["text-classification"].create_objective("encoder", MULTI_LABEL)
    labels = [(1.0, 0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.0, 1.0)]
    rows = [Encoded([5], label, 0) for label in labels]
    assert objective.balance(rows, 3) == (3.0, 1.0, 1.0)
