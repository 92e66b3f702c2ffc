"""Which evaluation is the best, by which metric, and which best models stay on the disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ftlevel.artifacts.cards import format_selected_model
from ftlevel.artifacts.checkpoints import best_of, delete_best_after, rotate_best, save_best
from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError
from ftlevel.tasks import TASKS
from ftlevel.training.best import (
    BestModel,
    EvalResult,
    Evaluations,
    Length,
    SelectedModel,
    resolve_best_model,
)

PLAN: dict[str, Any] = {
    "metric": "eval_accuracy", "greater_is_better": True, "reason": "", "loads": True,
    "patience": None, "threshold": 0.0, "saves": False,
}  # fmt: skip


def best_steps(values: list[float], **more: Any) -> list[int]:
    """Return the steps that were the best when they came."""
    seen = Evaluations(BestModel(**PLAN | more))
    return [
        step for step, value in enumerate(values, 1) if seen.add(step, {"eval_accuracy": value})
    ]


def test_the_first_of_equals_is_the_best_and_what_is_no_number_never() -> None:
    assert best_steps([math.nan, 0.5, 0.5, 0.4, math.nan, 0.6]) == [2, 6]
    assert best_steps([0.5, 0.4, 0.4, 0.3], greater_is_better=False) == [1, 2, 4]
    seen = Evaluations(BestModel(**PLAN))
    assert not seen.add(1, {"eval_loss": 1.0}), "a correlation with a constant is not there"
    assert seen.best is None


def test_a_longer_run_counts_all_evaluations_without_a_better_one() -> None:
    """Resumed after an early stop, with more steps, a run waits longer than its patience."""
    seen = Evaluations(BestModel(**PLAN | {"patience": 1}))
    for step, value in enumerate((0.5, 0.4, 0.3), 1):
        seen.add(step, {"eval_accuracy": value})
    assert seen.best is not None
    assert seen.last is not None
    kept = SelectedModel(metric="eval_accuracy", greater_is_better=True, evaluations=seen.num_evals,
                best=seen.best, last=seen.last, step=1, stopped_early=True, patience=1,
                waited=seen.waited)  # fmt: skip
    assert format_selected_model(kept.describe()).endswith(
        "after 2 evaluations without a better one"
    )
    former = {key: value for key, value in kept.describe().items() if key != "waited"}
    assert format_selected_model(former).endswith("after 1 evaluation without a better one")


def test_of_equals_the_one_with_the_lower_loss_is_the_best() -> None:
    seen = Evaluations(BestModel(**PLAN | {"patience": 9}))
    losses = [0.5, 0.4, 0.45, 0.3]
    scores = [{"eval_accuracy": 1.0, "eval_loss": loss} for loss in losses]
    assert [seen.add(step, each) for step, each in enumerate(scores)] == [True, True, False, True]
    assert seen.waited == 3


def test_patience_counts_evaluations_that_are_not_better_by_the_threshold() -> None:
    seen = Evaluations(BestModel(**PLAN | {"patience": 2, "threshold": 0.1}))
    waited = []
    for step, value in enumerate([0.5, 0.55, 0.7, 0.75, 0.8], 1):
        seen.add(step, {"eval_accuracy": value})
        waited.append((seen.waited, seen.is_over))
    assert waited == [(0, False), (1, False), (0, False), (1, False), (2, True)]
    assert seen.best == EvalResult(5, 0.8), "the best is the best, by however little"


def test_patience_ends_a_run_whose_metric_is_never_a_number() -> None:
    seen = Evaluations(BestModel(**PLAN | {"patience": 2}))
    for step in (1, 2):
        seen.add(step, {"eval_accuracy": math.nan})
    assert seen.is_over
    assert seen.best is None


def test_a_log_gives_the_same_as_the_evaluations() -> None:
    log = [{"step": 0, "eval_loss": 1.0, "eval_accuracy": 0.9}, {"step": 2, "loss": 1.0},
           {"step": 2, "eval_loss": 1.0, "eval_accuracy": 0.5},
           {"step": 4, "eval_loss": 1.0, "eval_accuracy": 0.25}]  # fmt: skip
    seen = Evaluations(BestModel(**PLAN))
    seen.replay(log)
    assert (seen.best, seen.last, seen.num_evals, seen.waited) == (
        EvalResult(2, 0.5, 1.0), EvalResult(4, 0.25, 1.0), 2, 1
    )  # fmt: skip


def choose(name: str, facts: dict[str, Any], kind: str, **train: Any) -> BestModel | None:
    task = TASKS[name]
    config = TrainConfig.model_validate({"task": name, "train": train})
    objective = task.create_objective(kind, facts)
    return resolve_best_model(config.method, config.train, task, objective, 9, Length(10, 2.0))


@pytest.mark.parametrize(
    ("name", "facts", "kind", "metric", "greater"),
    [
        ("text-classification", {}, "encoder", "eval_accuracy", True),
        ("text-classification", {"problem_type": "regression"}, "encoder", "eval_pearson", True),
        ("text-classification", {"problem_type": "multi_label_classification"}, "encoder",
         "eval_micro_f1", True),
        ("token-classification", {"labels": ["O", "B-X"]}, "encoder", "eval_f1", True),
        ("question-answering", {}, "encoder", "eval_f1", True),
        ("masked-lm", {}, "encoder", "eval_loss", False),
        ("text-generation", {}, "decoder", "eval_loss", False),
        ("summarization", {}, "encoder-decoder", "eval_loss", False),
        ("translation", {}, "decoder", "eval_loss", False),
    ],
)  # fmt: skip
def test_the_metric_by_default(
    name: str, facts: dict[str, Any], kind: str, metric: str, greater: bool
) -> None:
    best = choose(name, facts, kind)
    assert best is not None
    assert (best.metric, best.greater_is_better, best.loads) == (metric, greater, True)


def test_the_metric_by_name() -> None:
    best = choose("summarization", {}, "decoder", metric_for_best_model="rouge2")
    assert best is not None
    assert best.greater_is_better
    best = choose("text-generation", {}, "decoder", metric_for_best_model="eval_perplexity")
    assert best is not None
    assert not best.greater_is_better
    with pytest.raises(ConfigError, match="It is scored with --predict-with-generate"):
        choose("text-generation", {}, "decoder", metric_for_best_model="rougeL")


@pytest.mark.parametrize(
    ("train", "loads"),
    [({}, True), ({"eval_steps": 10}, None), ({"eval_steps": 4}, True), ({"eval_steps": 0.5}, True),
     ({"eval_strategy": "no"}, None), ({"load_best_model_at_end": False}, None),
     ({"load_best_model_at_end": False, "early_stopping_patience": 1}, False),
     ({"eval_strategy": "no", "save_strategy": "epoch"}, None)],
)  # fmt: skip
def test_the_best_is_kept_where_there_are_several(train: dict[str, Any], loads: Any) -> None:
    best = choose("text-generation", {}, "decoder", **train)
    assert (best and best.loads) == loads


def test_each_checkpoint_keeps_the_best_of_its_time(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        (path / "x").write_text("x")

    def there() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    for step in (10, 20):
        save_best(tmp_path, step, fill)
    assert there() == {"best-20"}
    (tmp_path / "checkpoint-25").mkdir()
    for step in (30, 40):
        save_best(tmp_path, step, fill)
    assert there() == {"best-20", "checkpoint-25", "best-40"}
    assert (best_of(tmp_path, 40) / "manifest.json").is_file()
    (tmp_path / "checkpoint-25").rename(tmp_path / "checkpoint-45")
    rotate_best(tmp_path)
    assert there() == {"best-40", "checkpoint-45"}
    delete_best_after(tmp_path, 39)
    assert there() == {"checkpoint-45"}
