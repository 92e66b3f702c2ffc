"""Tests of the selection of the best evaluation, its metric and the kept checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ftlevel.artifacts.cards import format_selected_model
from ftlevel.artifacts.checkpoints import best_of, delete_best_after, rotate_best, save_best
from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError
from ftlevel.events import NullListener
from ftlevel.tasks import TASKS
from ftlevel.training.best import (
    BestModel,
    BestModelCallback,
    EvalResult,
    Evaluations,
    SelectedModel,
    is_greater_better,
    resolve_best_model,
)
from ftlevel.training.processes import Processes

BEST_MODEL: dict[str, Any] = {
    "metric": "eval_accuracy", "greater_is_better": True, "reason": "", "loads": True,
    "patience": None, "threshold": 0.0, "saves": False,
}  # fmt: skip


def evaluate(values: list[float], **overrides: Any) -> Evaluations:
    """Return evaluations with these accuracies at steps 1, 2, …"""
    evaluations = Evaluations(BestModel(**BEST_MODEL | overrides))
    for step, value in enumerate(values, 1):
        evaluations.add(step, {"eval_accuracy": value})
    return evaluations


def best_steps(values: list[float], **overrides: Any) -> list[int]:
    """Return the steps that were the best when they were evaluated."""
    evaluations = Evaluations(BestModel(**BEST_MODEL | overrides))
    steps = enumerate(values, 1)
    return [step for step, value in steps if evaluations.add(step, {"eval_accuracy": value})]


def test_first_of_equal_values_is_best_and_nan_never():
    assert best_steps([math.nan, 0.5, 0.5, 0.4, math.nan, 0.6]) == [2, 6]
    assert best_steps([0.5, 0.4, 0.4, 0.3], greater_is_better=False) == [1, 2, 4]
    evaluations = Evaluations(BestModel(**BEST_MODEL))
    assert not evaluations.add(1, {"eval_loss": 1.0}), "a correlation with a constant is not there"
    assert evaluations.best is None


def test_resumed_run_counts_all_evaluations_without_improvement():
    """A run resumed with more steps after early stopping waits longer than its patience."""
    evaluations = evaluate([0.5, 0.4, 0.3], patience=1)
    selected = SelectedModel(
        evaluations=evaluations, best=evaluations.best, last=evaluations.last, step=1,
        stopped_early=True,
    )  # fmt: skip
    line = format_selected_model(selected.describe())
    assert line.endswith("after 2 evaluations without a better one")


def test_evaluation_of_the_kept_model_is_not_counted(tmp_path):
    """A run whose last step was not evaluated evaluates the model that it keeps."""
    plan = BestModel(**BEST_MODEL | {"loads": False, "patience": 3})
    callback = BestModelCallback(plan, tmp_path, Processes(), (), NullListener())
    for step, value in ((2, 0.5), (4, 0.4)):
        callback.evaluations.add(step, {"eval_accuracy": value})
    selected = callback.finish(None, step=5, max_steps=5)
    callback.evaluations.add(5, {"eval_accuracy": 0.4})
    values = selected.describe()
    assert (values["evaluations"], values["waited"], values["last_step"]) == (2, 1, 4)


def test_tie_is_described_without_a_loss():
    """A run of `--task rl` has no evaluation loss."""
    first, last = (EvalResult(step, 0.2) for step in (1, 3))
    evaluations = Evaluations(BestModel(**BEST_MODEL | {"metric": "eval_reward"}))
    evaluations.num_evals, evaluations.waited = 3, 2
    selected = SelectedModel(
        evaluations=evaluations, best=first, last=last, step=1, stopped_early=False
    )
    assert format_selected_model(selected.describe()) == (
        "step 1 of 3: eval_reward 0.2000, the last had 0.2000, too"
    )


def test_lower_loss_breaks_ties():
    evaluations = Evaluations(BestModel(**BEST_MODEL | {"patience": 9}))
    scores = [{"eval_accuracy": 1.0, "eval_loss": loss} for loss in (0.5, 0.4, 0.45, 0.3)]
    better = [evaluations.add(step, metrics) for step, metrics in enumerate(scores)]
    assert better == [True, True, False, True]
    assert evaluations.waited == 3


def test_patience_counts_improvements_below_threshold():
    evaluations = Evaluations(BestModel(**BEST_MODEL | {"patience": 2, "threshold": 0.1}))
    waited = []
    for step, value in enumerate([0.5, 0.55, 0.7, 0.75, 0.8], 1):
        evaluations.add(step, {"eval_accuracy": value})
        waited.append((evaluations.waited, evaluations.is_over))
    assert waited == [(0, False), (1, False), (0, False), (1, False), (2, True)]
    assert evaluations.best == EvalResult(5, 0.8), "the best is the best, by however little"


def test_patience_stops_run_with_nan_metric():
    evaluations = evaluate([math.nan, math.nan], patience=2)
    assert evaluations.is_over
    assert evaluations.best is None


def test_replaying_log_matches_evaluations():
    log = [{"step": 0, "eval_loss": 1.0, "eval_accuracy": 0.9}, {"step": 2, "loss": 1.0},
           {"step": 2, "eval_loss": 1.0, "eval_accuracy": 0.5},
           {"step": 4, "eval_loss": 1.0, "eval_accuracy": 0.25}]  # fmt: skip
    evaluations = Evaluations(BestModel(**BEST_MODEL))
    evaluations.replay(log)
    assert (evaluations.best, evaluations.last, evaluations.num_evals, evaluations.waited) == (
        EvalResult(2, 0.5, 1.0), EvalResult(4, 0.25, 1.0), 2, 1
    )  # fmt: skip


def test_replaying_log_needs_no_validation_loss():
    """Evaluations by rewards have none: a resumed run forgot its best model."""
    evaluations = Evaluations(BestModel(**BEST_MODEL | {"metric": "eval_reward"}))
    evaluations.replay([{"step": 2, "eval_reward": 0.5}, {"step": 4, "eval_reward": 0.25}])
    assert (evaluations.best.step, evaluations.num_evals, evaluations.waited) == (2, 2, 1)


def test_evaluation_of_rewards_has_no_loss():
    with pytest.raises(ConfigError, match=r"does not report this metric\. There are: reward,"):
        resolve_best("rl", {}, "decoder", {"reward": ["exact"]}, metric_for_best_model="loss")


def resolve_best(
    name: str, properties: dict[str, Any], kind: str, rl: dict[str, Any] | None = None, **train: Any
) -> BestModel | None:
    task = TASKS[name]
    config = TrainConfig.model_validate({"task": name, "train": train, "rl": rl or {}})
    objective = task.create_objective(kind, properties)
    return resolve_best_model(config.method, config.train, task, objective, 9, 10, 5)


@pytest.mark.parametrize(
    ("name", "properties", "kind", "metric"),
    [
        ("text-classification", {}, "encoder", "eval_accuracy"),
        ("text-classification", {"problem_type": "regression"}, "encoder", "eval_pearson"),
        ("text-classification", {"problem_type": "multi_label_classification"}, "encoder",
         "eval_micro_f1"),
        ("token-classification", {"labels": ["O", "B-X"]}, "encoder", "eval_f1"),
        ("question-answering", {}, "encoder", "eval_f1"),
        ("masked-lm", {}, "encoder", "eval_loss"),
        ("text-generation", {}, "decoder", "eval_loss"),
        ("summarization", {}, "encoder-decoder", "eval_loss"),
    ],
)  # fmt: skip
def test_default_metric_of_each_task(name, properties, kind, metric):
    best = resolve_best(name, properties, kind)
    assert (best.metric, best.greater_is_better) == (metric, metric != "eval_loss")
    assert best.loads is True


def test_metric_for_best_model_by_name():
    def resolve(task, metric):
        return resolve_best(task, {}, "decoder", metric_for_best_model=metric)

    assert resolve("summarization", "rouge2").greater_is_better
    assert not resolve("text-generation", "eval_perplexity").greater_is_better
    for name in ("eval_ece", "truncated"):  # calibration error, and share of completions
        assert not is_greater_better(TrainConfig().train, name)
    with pytest.raises(ConfigError, match="It is scored with --predict-with-generate"):
        resolve("text-generation", "rougeL")


@pytest.mark.parametrize(
    ("train", "loads"),
    [({}, True), ({"eval_steps": 10}, None), ({"eval_steps": 4}, True), ({"eval_steps": 0.5}, True),
     ({"eval_strategy": "no"}, None), ({"load_best_model_at_end": False}, None),
     ({"load_best_model_at_end": False, "early_stopping_patience": 1}, False),
     ({"eval_strategy": "no", "save_strategy": "epoch"}, None)],
)  # fmt: skip
def test_best_model_is_loaded_if_evaluated_several_times(train, loads):
    best = resolve_best("text-generation", {}, "decoder", **train)
    assert (best and best.loads) == loads


def test_rotation_keeps_best_model_of_each_checkpoint(tmp_path):
    def write_file(path: Path) -> None:
        (path / "x").write_text("x")

    def get_names() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    for step in (10, 20):
        save_best(tmp_path, step, write_file)
    assert get_names() == {"best-20"}
    (tmp_path / "checkpoint-25").mkdir()
    for step in (30, 40):
        save_best(tmp_path, step, write_file)
    assert get_names() == {"best-20", "checkpoint-25", "best-40"}
    assert (best_of(tmp_path, 40) / "manifest.json").is_file()
    (tmp_path / "checkpoint-25").rename(tmp_path / "checkpoint-45")
    rotate_best(tmp_path)
    assert get_names() == {"best-40", "checkpoint-45"}
    delete_best_after(tmp_path, 39)
    assert get_names() == {"checkpoint-45"}
