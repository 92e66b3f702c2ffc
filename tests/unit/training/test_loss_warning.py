"""Tests of the warning for a run whose loss did not decrease."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ftlevel.data.encoding.row import Encoded
from ftlevel.objectives import TrainingLoss
from ftlevel.tasks import TASKS
from ftlevel.training.summary import summarize_losses, warn_if_not_learned

CLASSES = [Encoded([1, 2], label, 0) for label in (0, 1)] * 4  # guessing gives ln 2 = 0.693
TEXT = [Encoded([1, 2], [1, 2], 0)] * 8


def get_warnings(
    task: str, kind: str, rows: list[Encoded], losses: list[float], rate: float = 2e-4
) -> list[str]:
    plan: Any = SimpleNamespace(
        objective=TASKS[task].create_objective(kind, {}),
        loss=TrainingLoss(),
        data=SimpleNamespace(train=rows),
        schedule=SimpleNamespace(learning_rate=rate, default_learning_rate=2e-4),
    )
    return warn_if_not_learned(summarize_losses(losses), plan)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.70, 0.69, 0.70, 0.70, 0.69, 0.70], ["Try a higher --learning-rate than 0.0002"]),
        ([0.70, 0.69, 0.70, 0.95, 1.10, 0.95], ["Try a lower --learning-rate than 0.0002"]),
        ([0.9, 0.9, 0.9, 0.7, 0.66, 0.65], []),
        ([0.9, 0.9, 0.9, 0.9, 0.9], []),
    ],
)
def test_classification_loss_is_compared_with_guessing(losses, expected):
    warnings = get_warnings("text-classification", "encoder", CLASSES, losses)
    assert len(warnings) == len(expected)
    for line, end in zip(warnings, expected, strict=True):
        assert line.startswith(
            f"the loss ended at {sum(losses[-3:]) / 3:.3f} (mean of the last 3 that were logged), "
            "and guessing by answer frequency gives 0.693: nothing was learned. "
        )
        assert end in line


def test_lower_learning_rate_is_suggested_far_above_default():
    (line,) = get_warnings("text-generation", "decoder", TEXT, [3.0, 3.1, 3.0] * 2, 2e-2)
    assert "Try a lower --learning-rate than 0.02 (0.0002 is the default here), or" in line


@pytest.mark.parametrize(
    ("losses", "count"),
    [([3.0, 3.1, 3.2] * 2, 1), ([3.1, 3.1, 3.2, 3.1, 3.0, 2.9], 0), ([3.0], 0)],
)
def test_text_loss_is_compared_with_first_loss(losses, count):
    warnings = get_warnings("text-generation", "decoder", TEXT, losses)
    assert len(warnings) == count
    for line in warnings:
        assert "ended at 3.100 (mean of the last 3 that were logged), and began at 3.100" in line
