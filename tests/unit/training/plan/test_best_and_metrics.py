"""Tests of the best-model metric together with `--metrics`."""

from __future__ import annotations

from typing import Any

import pytest

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError
from ftlevel.tasks import TASKS
from ftlevel.tasks.classes import Classes
from ftlevel.training.best import resolve_best_model


def _resolve(config: TrainConfig, task: Any) -> Any:
    objective = Classes("accuracy")
    return resolve_best_model(config.method, config.train, task, objective, 8, 20, 5)


def resolve(**train: Any) -> Any:
    config = TrainConfig.model_validate({"method": {"kind": "full"}, "train": train})
    task = TASKS["text-classification"]
    return _resolve(config, task)


def get_metric(task: str = "text-classification", **train: Any) -> str:
    config = TrainConfig.model_validate({"task": task, "train": train})
    best = _resolve(config, TASKS[task])
    assert best is not None
    return best.metric


def test_default_metric_is_first_of_metrics() -> None:
    assert get_metric() == "eval_accuracy"
    assert get_metric(metrics=["f1"]) == "eval_f1"
    assert get_metric(metrics=["loss"]) == "eval_loss"


def test_metric_missing_from_metrics_raises() -> None:
    assert (
        get_metric(metrics=["f1", "accuracy"], metric_for_best_model="accuracy") == "eval_accuracy"
    )
    with pytest.raises(ConfigError, match="--metrics leaves it out: --metrics f1,accuracy"):
        get_metric(metrics=["f1"], metric_for_best_model="eval_accuracy")


def test_sharded_weights_keep_last_checkpoint_by_default() -> None:
    assert resolve().loads
    best = resolve(shard="full")
    assert not best.loads
    expected = "keeping the last checkpoint, not the one with the highest eval_accuracy"
    assert best.choice.value == expected
    assert best.choice.reason == "--shard full shards the trained weights"
    assert not resolve(shard="grads", early_stopping_patience=2, metric_for_best_model="f1").loads


@pytest.mark.parametrize("settings", [{"load_best_model_at_end": True},
                                   {"metric_for_best_model": "f1"}])  # fmt: skip
def test_explicit_best_model_is_kept_with_sharding(settings: dict[str, Any]) -> None:
    assert resolve(
        shard="full", **settings
    ).loads  # raises later, naming the flag, before weights load
