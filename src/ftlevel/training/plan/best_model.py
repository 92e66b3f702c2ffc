"""Selection of the best checkpoint: metric, early stopping and `load_best_model_at_end`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ftlevel.config import MethodConfig
from ftlevel.config.section import Choice
from ftlevel.config.trainer import TrainerConfig
from ftlevel.errors import ConfigError, did_you_mean, join_names
from ftlevel.evaluation.intervals import generates_texts, select_metrics, uses_text_metrics
from ftlevel.methods import METHODS
from ftlevel.task import Objective
from ftlevel.tasks import BaseTask

LOWER_IS_BETTER = ("loss", "perplexity", "rmse", "mse", "mae", "error")
"""Suffixes of metric names for which lower is better."""


@dataclass(frozen=True)
class Length:
    """Length of a run in optimizer steps and epochs; a stream counts as one epoch."""

    steps: int
    epochs: float


@dataclass(frozen=True, kw_only=True)
class BestModel:
    """Selection and use of the best evaluation.

    `metric` has the prefix `eval_`. `loads` restores the best model at the end, `saves` writes a
    checkpoint of each new best. Training stops after `patience` evaluations that improve by no more
    than `threshold`.
    """

    metric: str
    greater_is_better: bool
    reason: str
    loads: bool
    patience: int | None
    threshold: float
    saves: bool

    def is_better(self, value: float, than: float, by: float = 0.0) -> bool:
        """Return whether `value` is better `than` another by more than `by`; NaN never is."""
        gain = value - than if self.greater_is_better else than - value
        return gain > by

    @property
    def choice(self) -> Choice:
        """Line shown at the start of the run."""
        order = "highest" if self.greater_is_better else "lowest"
        kept = "checkpoint with the" if self.loads else "last checkpoint, not the one with the"
        return Choice("best model", f"keeping the {kept} {order} {self.metric}", self.reason)


def resolve_best_model(
    method: MethodConfig,
    train: TrainerConfig,
    task: BaseTask,
    objective: Objective,
    rows: int,
    length: Length,
) -> BestModel | None:
    """Return how the best model is selected; None if nothing requires a selection.

    `rows` is the number of validation rows.

    Raises:
        ConfigError: a flag requires evaluation but there are no rows, or the metric does not exist.
    """
    _check_rows(train, rows)
    wish, saves = train.load_best_model_at_end, train.save_strategy == "best"
    metric, reason = _choose_metric(train, task, objective)
    compares = wish if wish is not None else bool(rows) and _evaluations(train, length) > 1
    needs_metric = saves or train.early_stopping_patience is not None
    if not rows or not (compares or needs_metric):
        return None
    loads = compares
    asks = wish or (train.metric_for_best_model is not None and not needs_metric)
    if compares and is_trained_sharded(method, train) and not asks:
        loads, reason = False, f"--shard {train.shard} shards the trained weights"
    greater = train.greater_is_better
    if greater is None:
        greater = not metric.endswith(LOWER_IS_BETTER)
    return BestModel(
        metric=metric,
        greater_is_better=greater,
        reason=reason,
        loads=loads,
        patience=train.early_stopping_patience,
        threshold=train.early_stopping_threshold,
        saves=saves,
    )


def is_trained_sharded(method: MethodConfig, train: TrainerConfig) -> bool:
    """Return whether the trained weights are sharded across processes."""
    return train.shard != "none" and METHODS[method.kind].build is None


def _check_rows(train: TrainerConfig, rows: int) -> None:
    """Reject flags that require evaluation if there are no validation rows."""
    asked = {
        f"--early-stopping-patience {train.early_stopping_patience}": train.early_stopping_patience,
        "--load-best-model-at-end": train.load_best_model_at_end,
        "--save-strategy best": train.save_strategy == "best",
        f"--metric-for-best-model {train.metric_for_best_model}": train.metric_for_best_model,
    }
    names = [name for name, is_asked in asked.items() if is_asked]
    if names and not rows:
        raise ConfigError(
            f"{names[0]} needs validation rows to evaluate, and the data has none. Name some by "
            "--validation-file, or hold some back: --validation-split 0.05."
        )


def _choose_metric(train: TrainerConfig, task: BaseTask, objective: Objective) -> tuple[str, str]:
    """Return the metric as `eval_NAME`, and the reason; raise ConfigError if it does not exist.

    The default is the loss, but tasks that score every row or token use their own first metric: it
    can improve while the loss rises. ROUGE covers few rows, and perplexity follows the loss.
    """
    wish, given = train.metric_for_best_model, train.metrics
    generates = generates_texts(train.predict_with_generate, task) and uses_text_metrics(
        given, task
    )
    every = ("loss", *objective.metrics, *(task.text_metrics if generates else ()))
    known = tuple(select_metrics(dict.fromkeys(every), given))
    if wish is not None:
        name = wish.removeprefix("eval_")
        if name not in known:
            hint = did_you_mean(name, known)
            if name in every:
                hint = f" --metrics leaves it out: --metrics {','.join([*given, name])}."
            elif name in task.text_metrics:
                hint = " It is scored with --predict-with-generate."
            raise ConfigError(
                f"--metric-for-best-model {wish}: --task {task.name} has no such metric here."
                f"{hint} There are: {join_names(known, 20)}."
            )
        return f"eval_{name}", "as asked"
    first, of_all_rows = objective.headline, [m for m in objective.metrics if m in known]
    if first not in known and of_all_rows:
        first = of_all_rows[0]  # limited to --metrics
    if first in of_all_rows and not first.endswith("perplexity"):
        return f"eval_{first}", "the task's first metric, scored on all validation rows"
    if given and first not in known:
        return "eval_loss", "no other metric is given"
    why = (
        f"{first} increases with the loss"
        if first in of_all_rows
        else f"{first} is scored on the first {train.max_generate_samples:,} rows alone"
    )
    return "eval_loss", why


def _evaluations(train: TrainerConfig, length: Length) -> int:
    """Estimate the number of evaluations; exact only as to whether there is more than one."""
    if train.eval_strategy == "no":
        return 1
    if train.eval_strategy != "epoch" and train.eval_steps:
        every = train.eval_steps
        return math.ceil(1 / every if every < 1 else length.steps / every)
    return math.ceil(length.epochs)
