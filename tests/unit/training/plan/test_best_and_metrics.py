"""The metric that picks the best model is one of those that `--metrics` gives."""

from __future__ import annotations

from typing import Any

import pytest

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError
from ftlevel.tasks import TASKS
from ftlevel.tasks.classes import Classes
from ftlevel.training.best import Length, resolve_best_model


def _resolve(config: TrainConfig, task: Any) -> Any:
    objective, length = Classes("accuracy"), Length(20, 4.0)
    return resolve_best_model(config.method, config.train, task, objective, 8, length)


def resolve(**train: Any) -> Any:
    config = TrainConfig.model_validate({"method": {"kind": "full"}, "train": train})
    task = TASKS["text-classification"]
    return _resolve(config, task)


def metric(task: str = "text-classification", **train: Any) -> str:
    config = TrainConfig.model_validate({"task": task, "train": train})
    best = _resolve(config, TASKS[task])
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


def test_the_last_model_is_the_default_where_the_trained_weights_are_sharded() -> None:
    assert resolve().loads
    best = resolve(shard="full")
    assert not best.loads
    kept = "keeping the last checkpoint, not the one with the highest eval_accuracy"
    assert best.choice.value == kept
    assert best.choice.reason == "--shard full shards the trained weights"
    assert not resolve(shard="grads", early_stopping_patience=2, metric_for_best_model="f1").loads


@pytest.mark.parametrize("asked", [{"load_best_model_at_end": True},
                                   {"metric_for_best_model": "f1"}])  # fmt: skip
def test_a_best_model_that_is_asked_for_is_not_dropped(asked: dict[str, Any]) -> None:
    assert resolve(shard="full", **asked).loads  # refused with the flag, before weights load
