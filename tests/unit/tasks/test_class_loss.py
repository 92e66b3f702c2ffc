"""Weighted and focal losses are those of torch and of the papers, over a whole step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from ftlevel.data.encoding.encode import Encoded
from ftlevel.objectives import Objective, TrainingLoss
from ftlevel.tasks import TASKS

WEIGHTS = (0.25, 3.0, 1.5)
SEVERAL = {"problem_type": "multi_label_classification"}


def mean(objective: Objective, logits: Any, labels: Any, loss: TrainingLoss) -> torch.Tensor:
    """Return the loss of a step that was computed in two micro-batches."""
    parts = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    mask = torch.ones(3, 5)
    total = sum(objective.training_sum(scores, own, mask, loss) for scores, own in parts)
    count = sum(objective.training_count(own, loss) for _, own in parts)
    return total / count  # type: ignore[operator,return-value]


def rows_of_classes() -> tuple[Objective, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    objective = TASKS["text-classification"].create_objective("encoder", {})
    return objective, torch.randn(7, 3, generator=generator), torch.tensor([0, 0, 1, 2, 0, 1, 0])


def words() -> tuple[Objective, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (6, 5), generator=generator)
    labels[labels.cumsum(1) % 2 == 0] = -100
    objective = TASKS["token-classification"].create_objective("encoder", {"labels": "abc"})
    return objective, torch.randn(6, 5, 3, generator=generator), labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("made", [rows_of_classes, words])
def test_weights_are_torchs(made: Any, smoothing: float) -> None:
    objective, logits, labels = made()
    reference = nn.CrossEntropyLoss(torch.tensor(WEIGHTS), label_smoothing=smoothing)
    expected = reference(logits.reshape(-1, 3), labels.flatten())
    found = mean(objective, logits, labels, TrainingLoss(smoothing, WEIGHTS))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mean(objective, logits, labels, TrainingLoss(smoothing)) != pytest.approx(found)


@pytest.mark.parametrize("weights", [(), WEIGHTS])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("made", [rows_of_classes, words])
def test_focal_loss_of_classes(made: Any, gamma: float, weights: tuple[float, ...]) -> None:
    objective, logits, labels = made()
    each, total = [], 0.0
    for scores, label in zip(logits.reshape(-1, 3), labels.flatten().tolist(), strict=True):
        if label == -100:
            continue
        p, alpha = torch.softmax(scores, 0)[label], (weights or (1.0, 1.0, 1.0))[label]
        each.append(-alpha * (1 - p) ** gamma * torch.log(p))
        total += alpha
    found = mean(objective, logits, labels, TrainingLoss(0.0, weights, gamma))
    assert found.item() == pytest.approx(sum(each).item() / total, rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("weights", [(), WEIGHTS])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_yes_and_no_of_each_class(gamma: float, weights: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 3, generator=generator)
    labels = torch.randint(0, 2, (6, 3), generator=generator).float()
    objective = TASKS["text-classification"].create_objective("encoder", SEVERAL)
    of_yes = torch.tensor(weights or (1.0, 1.0, 1.0))
    p = logits.sigmoid()
    yes, no = (1 - p) ** gamma * p.log(), p**gamma * (1 - p).log()
    expected = -(of_yes * labels * yes + (1 - labels) * no).mean()
    if not gamma:
        torch.testing.assert_close(
            nn.BCEWithLogitsLoss(pos_weight=of_yes)(logits, labels), expected
        )
    found = mean(objective, logits, labels, TrainingLoss(0.0, weights, gamma))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_certain_answer_has_a_finite_slope() -> None:
    objective, _, _ = rows_of_classes()
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = TrainingLoss(focal_gamma=0.5)
    objective.training_sum(logits, torch.tensor([0]), torch.ones(1, 1), loss).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_balanced_weights_are_scikit_learns() -> None:
    classes, _, labels = rows_of_classes()
    rows = [Encoded([5], label, 0) for label in labels.tolist()]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert classes.balance(rows, 3) == pytest.approx(tuple(expected))
    assert classes.balance(rows, 4) == pytest.approx((*expected, 1.0))  # of which there is none
    tags, _, labels = words()
    rows = [Encoded([5] * 5, own, 0) for own in labels.tolist()]
    true = labels[labels != -100].numpy()
    expected = compute_class_weight("balanced", classes=np.arange(3), y=true)
    assert tags.balance(rows, 3) == pytest.approx(tuple(expected))


def test_balanced_yes_to_no() -> None:
    objective = TASKS["text-classification"].create_objective("encoder", SEVERAL)
    answers = [(1.0, 0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.0, 1.0)]
    rows = [Encoded([5], answer, 0) for answer in answers]
    assert objective.balance(rows, 3) == (3.0, 1.0, 1.0)
