"""The best model of a run: metric, early stopping, saved weights and per-row results."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts.checkpoints import best_of, delete_best_after, detect_corruption, save_best
from ftlevel.config import MethodConfig
from ftlevel.config.section import Choice
from ftlevel.config.trainer import TrainerConfig
from ftlevel.errors import ConfigError, did_you_mean, join_names
from ftlevel.evaluation.intervals import (
    ExampleRecord,
    list_metrics,
    select_metrics,
    should_generate,
    uses_text_metrics,
)
from ftlevel.events import Listener
from ftlevel.methods import METHODS
from ftlevel.methods.base import HasState
from ftlevel.objectives import Objective
from ftlevel.tasks import BaseTask
from ftlevel.training.processes import Processes
from ftlevel.weights.checkpoint import TensorPart, get_tensor_info, load_header, write_file

_LOWER_IS_BETTER = ("loss", "perplexity", "rmse", "mse", "mae", "error", "ece", "truncated")
"""Suffixes of metric names for which lower is better."""


def is_greater_better(train: TrainerConfig, metric: str) -> bool:
    """Returns whether higher values of `metric` are better: as set in `train`, else by its name."""
    greater = train.greater_is_better
    return greater if greater is not None else not metric.endswith(_LOWER_IS_BETTER)


@dataclass(frozen=True, kw_only=True)
class BestModel:
    """Resolved settings by which a run selects its best model, and loads or saves it.

    Attributes:
        metric: name of the metric, with the prefix `eval_`.
        loads: whether the best weights are loaded at the end of training.
        patience: number of evaluations without improvement after which training stops.
        threshold: smallest improvement that resets the patience counter.
        saves: whether each new best model is saved as a checkpoint.
    """

    metric: str
    greater_is_better: bool
    reason: str
    loads: bool
    patience: int | None
    threshold: float
    saves: bool

    def is_better(self, value: float, than: float, by: float = 0.0) -> bool:
        """Returns whether `value` is better than `than` by more than `by`; False for NaN."""
        gain = value - than if self.greater_is_better else than - value
        return gain > by

    @property
    def choice(self) -> Choice:
        """The line about the best model that is printed at the start of the run."""
        order = "highest" if self.greater_is_better else "lowest"
        kept = "checkpoint" if self.loads else "last checkpoint, not the one"
        value = f"keeping the {kept} with the {order} {self.metric}"
        return Choice("best model", value, self.reason)


def resolve_best_model(
    method: MethodConfig,
    train: TrainerConfig,
    task: BaseTask,
    objective: Objective,
    num_eval_samples: int,
    steps: int,
    steps_per_epoch: int,
) -> BestModel | None:
    """Returns how a run selects its best model; None if it does not, as without validation rows."""
    _check_eval_data(train, num_eval_samples)
    load_best, save_best = train.load_best_model_at_end, train.save_strategy == "best"
    metric, reason = _select_metric(train, task, objective)
    uses_best = (
        load_best
        if load_best is not None
        else bool(num_eval_samples) and _estimate_num_evaluations(train, steps, steps_per_epoch) > 1
    )
    needs_metric = save_best or train.early_stopping_patience is not None
    if not num_eval_samples or not (uses_best or needs_metric):
        return None
    loads = uses_best
    is_requested = load_best or (train.metric_for_best_model is not None and not needs_metric)
    if uses_best and is_trained_sharded(method, train) and not is_requested:
        loads, reason = False, f"--shard {train.shard} shards the trained weights"
    return BestModel(
        metric=metric,
        greater_is_better=is_greater_better(train, metric),
        reason=reason,
        loads=loads,
        patience=train.early_stopping_patience,
        threshold=train.early_stopping_threshold,
        saves=save_best,
    )


def is_trained_sharded(method: MethodConfig, train: TrainerConfig) -> bool:
    """Returns whether the trained weights are sharded across processes."""
    return train.shard != "none" and not METHODS[method.kind].is_adapter


def _check_eval_data(train: TrainerConfig, num_eval_samples: int) -> None:
    flags = {
        f"--early-stopping-patience {train.early_stopping_patience}": train.early_stopping_patience,
        "--load-best-model-at-end": train.load_best_model_at_end,
        "--save-strategy best": train.save_strategy == "best",
        f"--metric-for-best-model {train.metric_for_best_model}": train.metric_for_best_model,
    }
    names = [name for name, is_set in flags.items() if is_set]
    if names and not num_eval_samples:
        raise ConfigError(
            f"{names[0]} needs validation rows to evaluate, and the data has none, or all were "
            "dropped. Name others by --validation-file, or hold some back: --validation-split 0.05."
        )


def _select_metric(train: TrainerConfig, task: BaseTask, objective: Objective) -> tuple[str, str]:
    """Returns the metric, as `eval_NAME`, and the reason; ConfigError if no evaluation computes it.

    Default: the task's main metric; the loss if that metric is perplexity or needs generated text.
    """
    requested, selected = train.metric_for_best_model, train.metrics
    uses_generation = should_generate(train.predict_with_generate, task) and uses_text_metrics(
        selected, task
    )
    metric_names = list_metrics(task, objective, generates=uses_generation)
    available = tuple(select_metrics(dict.fromkeys(metric_names), selected))
    if requested is not None:
        name = requested.removeprefix("eval_")
        if name not in available:
            suffix = did_you_mean(name, available)
            if name in metric_names:
                suffix = f" --metrics leaves it out: --metrics {','.join([*selected, name])}."
            elif name in task.text_metrics:
                suffix = " It is scored with --predict-with-generate."
            raise ConfigError(
                f"--metric-for-best-model {requested}: --task {task.name} does not report this "
                f"metric.{suffix} There are: {join_names(available, 20)}."
            )
        return f"eval_{name}", "as requested"
    first, per_row = objective.headline, [m for m in objective.metrics if m in available]
    if first not in available and per_row:
        first = per_row[0]  # limited to --metrics
    if first in per_row and not first.endswith("perplexity"):
        return f"eval_{first}", "the task's first metric, scored on all validation rows"
    if selected and first not in available:
        return "eval_loss", "no other metric is given"
    reason = (
        f"{first} increases with the loss"
        if first in per_row
        else f"{first} is scored on the first {train.max_generate_samples:,} rows alone"
    )
    return "eval_loss", reason


def _estimate_num_evaluations(train: TrainerConfig, steps: int, steps_per_epoch: int) -> int:
    if train.eval_strategy == "no":
        return 1
    if train.eval_strategy != "epoch" and train.eval_steps:
        interval = train.eval_steps
        return math.ceil(1 / interval if interval < 1 else steps / interval)
    return math.ceil(steps / steps_per_epoch)


_WEIGHTS = "trained.safetensors"


@dataclass(frozen=True)
class EvalResult:
    """Metric value and loss of the evaluation at optimizer step `step`."""

    step: int
    value: float
    loss: float = math.nan


class Evaluations:
    """History of a run's evaluations, compared by the metric of `plan`.

    Attributes:
        best: the best evaluation; None while the metric was always NaN.
        waited: number of evaluations since the last improvement.
    """

    def __init__(self, plan: BestModel) -> None:
        self.plan = plan
        self.best: EvalResult | None = None
        self.last: EvalResult | None = None
        self.num_evals = 0
        self.waited = 0

    def add(self, step: int, scores: Mapping[str, Any]) -> bool:
        """Add the metrics `scores` of `step`; returns whether they are the best. Loss decides ties.

        A missing metric, such as a correlation with a constant, counts as NaN and is never best.
        """
        value = float(scores.get(self.plan.metric, math.nan))
        loss = float(scores.get("eval_loss", math.nan))
        best, self.last = self.best, EvalResult(step, value, loss)
        self.num_evals += 1
        is_number = not math.isnan(value)
        is_improvement = is_number and (
            best is None or self.plan.is_better(value, best.value, self.plan.threshold)
        )
        self.waited = 0 if is_improvement else self.waited + 1
        is_best = is_number and (
            best is None
            or self.plan.is_better(value, best.value)
            or (value == best.value and loss < best.loss)
        )
        if is_best:
            self.best = self.last
        return is_best

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add the evaluations in the log `records`, except that of the untrained model."""
        for record in records:
            if record["step"] > 0 and any(name.startswith("eval_") for name in record):
                self.add(record["step"], record)

    @property
    def is_over(self) -> bool:
        """Whether `patience` evaluations have passed without improvement."""
        return self.plan.patience is not None and self.waited >= self.plan.patience


@dataclass(frozen=True, kw_only=True)
class SelectedModel:
    """The best model, of optimizer step `step`, and the evaluations that chose it."""

    evaluations: Evaluations
    best: EvalResult
    last: EvalResult
    step: int
    stopped_early: bool

    def describe(self) -> dict[str, Any]:
        """Returns the `best` section of summary.json."""
        plan = self.evaluations.plan
        return {
            "metric": plan.metric,
            "greater_is_better": plan.greater_is_better,
            "evaluations": self.evaluations.num_evals,
            "kept_step": self.step,
            "best_step": self.best.step,
            "best": self.best.value,
            "last_step": self.last.step,
            "last": self.last.value,
            "stopped_early": self.stopped_early,
            "patience": plan.patience,
            "waited": self.evaluations.waited,
        }


def save_trained_weights(model: Any, path: Path) -> None:
    """Write the trainable tensors into directory `path`, without a second copy in memory."""
    tensors = [
        TensorPart({name: get_tensor_info(tensor)}, functools.partial(dict, {name: tensor}))
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    ]
    write_file(path / _WEIGHTS, tensors)


def load_trained_weights(model: Any, path: Path) -> None:
    """Load the tensors saved by `save_trained_weights` into `model` (modified), bit for bit.

    PEFT's loader is not used: it fails for prompt tuning and AdaLoRA, and ignores float32 heads.
    """
    saved, _ = load_header(path / _WEIGHTS)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if saved.keys() != parameters.keys():
        names = sorted(saved.keys() ^ parameters.keys())[0]
        raise ValueError(f"{path} contains other tensors than are trained, such as {names}")
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(saved[name].read())


class BestModelCallback(TrainerCallback):
    """Callback that saves the trainable tensors at each evaluation that is the best so far.

    Trainer's `load_best_model_at_end` needs a checkpoint at each evaluation, and its save strategy
    `best` saves no other checkpoints to resume from. On resume, the evaluations that early stopping
    counts are read from the log.
    """

    def __init__(
        self,
        plan: BestModel,
        checkpoint_dir: Path,
        processes: Processes,
        states: Sequence[HasState],
        listener: Listener,
    ) -> None:
        self.plan = plan
        self.checkpoint_dir = checkpoint_dir
        self.evaluations = Evaluations(plan)
        self._is_first = processes.is_first
        self._states = states
        self._listener = listener
        self._has_stopped = False
        self._is_corrupted = False

    def resume(self, step: int, past: Sequence[Mapping[str, Any]], *, has_new_length: bool) -> None:
        """Restore the evaluations up to the checkpoint of `step` from the log records `past`.

        Best models of later steps are deleted. A run that had stopped early will stop again, unless
        `has_new_length`, which means that the run's number of steps was changed.
        """
        if self._is_first:
            delete_best_after(self.checkpoint_dir, step)
        self.evaluations.replay(past)
        best, last = self.evaluations.best, self.evaluations.last
        has_stopped = self.evaluations.is_over and last is not None and last.step == step
        self._has_stopped = has_stopped and not has_new_length
        if best is None or not self.plan.loads:
            return
        error = detect_corruption(best_of(self.checkpoint_dir, best.step))
        if error and best.step == step:  # the checkpoint has the same weights
            self._is_corrupted = True
        elif error:
            self._listener.warn(
                f"best-{best.step}: {error}; the earlier best model is lost, and the best of the "
                "next evaluations is kept"
            )
            self.evaluations = Evaluations(self.plan)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """On resume, rewrite a corrupted best model; stop if the run had stopped early."""
        if self._is_corrupted and self._is_first:
            save_best(self.checkpoint_dir, state.global_step, lambda to: self._save(model, to))
        control.should_training_stop |= self._has_stopped

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Record the evaluation, save the best model, and stop if `patience` is exhausted."""
        if state.global_step == 0:  # the model is untrained
            return
        if self.evaluations.add(state.global_step, metrics or {}):
            state.best_metric = (metrics or {})[self.plan.metric]
            control.should_save |= self.plan.saves
            # The last model is in memory; write it only with a checkpoint to resume from.
            is_resumable = state.global_step < state.max_steps or control.should_save
            if self.plan.loads and self._is_first and is_resumable:
                save_best(self.checkpoint_dir, state.global_step, lambda to: self._save(model, to))
        control.should_training_stop |= self.evaluations.is_over

    def _save(self, model: Any, path: Path) -> None:
        save_trained_weights(model, path)
        for state in self._states:
            state.save_state(path)

    def finish(self, model: Any, step: int, max_steps: int) -> SelectedModel | None:
        """Load the best weights into `model`, if configured; None if all metrics were NaN."""
        history, selected = self.evaluations, step
        if history.best is None or history.last is None:
            return None
        if self.plan.loads and history.best.step != step:
            path = best_of(self.checkpoint_dir, history.best.step)
            if damage := detect_corruption(path):
                self._listener.warn(f"{path.name}: {damage}; the last model is kept instead")
            else:
                load_trained_weights(model, path)
                for state in self._states:
                    state.load_state(path, model)
                selected = history.best.step
        return SelectedModel(
            evaluations=copy(history),  # the best model may be evaluated, too
            best=history.best,
            last=history.last,
            step=selected,
            stopped_early=history.is_over and step < max_steps,
        )


MAX_RECORDED_ROWS = 10_000  # above this, per-row results are not stored


class PredictionRecorder(TrainerCallback):
    """Callback that keeps per-row results of three evaluations: step 0, the best and the last."""

    def __init__(self, objective: Objective, best: BestModelCallback | None) -> None:
        self._objective = objective
        self._best = best
        self._current: ExampleRecord | None = None
        self._records: dict[int, ExampleRecord] = {}

    def begin(self) -> ExampleRecord:
        """Returns a new record, which the next evaluation fills with its results per row."""
        self._current = ExampleRecord(self._objective)
        return self._current

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Store the results of this evaluation; of earlier ones, keep only step 0 and the best."""
        best = self._best.evaluations.best if self._best else None
        steps = {0, state.global_step, best.step if best else None}
        if self._current is not None:
            self._records[state.global_step] = self._current
        self._records = {step: record for step, record in self._records.items() if step in steps}

    def complete(self, evaluator: Any, model: Any, step: int) -> None:
        """Evaluate `model` (of optimizer step `step`) if a resume lost its results per row."""
        if step not in self._records and getattr(evaluator, "begin_record", None) == self.begin:
            evaluator(model)
            if self._current is not None:
                self._records[step] = self._current

    def of(self, step: int) -> ExampleRecord | None:
        """Returns the results of the evaluation at `step`; None if this process stored none."""
        return self._records.get(step)
