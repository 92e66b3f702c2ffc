"""The metric that picks the best model is one of those that `--metrics` gives."""

from __future__ import annotations

from typing import Any

import pytest

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError
from ftlevel.tasks import TASKS
from ftlevel.tasks.classes import Classes
from ftlevel.training.plan.best_model import Length, resolve_best_model


def metric(task: str = "text-classification", **train: Any) -> str:
    config = TrainConfig.model_validate({"task": task, "train": train})
    best = resolve_best_model(config, TASKS[task], Classes("accuracy"), 8, Length(20, 4.0))
    assert best is not None
    return best.metric


def test_without_a_wish_it_is_the_first_that_is_given() -> None:
    assert metric() == "eval_accuracy"
    assert metric(metrics=["f1"]) == "eval_f1"
    assert metric(metrics=["loss"]) == "eval_loss"


def test_one_that_is_left_out_is_refused() -> None:
    assert metric(metrics=["f1", "accuracy"], metric_for_best_model="accuracy") == "eval_accuracy"
    with pytest.raises(ConfigError, match="--metrics leaves it out: --metrics f1,accuracy"):
        metric(metrics=["f1"], metric_for_best_model="eval_accuracy")
