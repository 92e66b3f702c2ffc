"""Track the best evaluation of a run, save its weights, and stop early.

Also stores per-row results of the first, the best and the last evaluation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts.checkpoints import best_of, delete_best_after, find_damage, write_best
from ftlevel.evaluation.intervals import ExampleRecord
from ftlevel.events import Listener
from ftlevel.methods.base import HasState
from ftlevel.task import Objective
from ftlevel.training.plan.best_model import BestModel
from ftlevel.training.processes import Processes
from ftlevel.weights.tensor_files import TensorPart, read_header, spec_of, write_file

_WEIGHTS = "trained.safetensors"


@dataclass(frozen=True)
class Evaluated:
    """Metric value and loss of the evaluation at a step."""

    step: int
    value: float
    loss: float = math.nan


class Evaluations:
    """History of a run's evaluations.

    `best` is None if no metric was a number; `waited` counts evaluations without improvement.
    """

    def __init__(self, plan: BestModel) -> None:
        self.plan = plan
        self.best: Evaluated | None = None
        self.last: Evaluated | None = None
        self.count = 0
        self.waited = 0

    def add(self, step: int, scores: Mapping[str, Any]) -> bool:
        """Add an evaluation and return whether it is the best; equal values compare by loss.

        A missing metric, such as the correlation with a constant, counts as NaN and is never the
        best.
        """
        value = float(scores.get(self.plan.metric, math.nan))
        loss = float(scores.get("eval_loss", math.nan))
        before, self.last = self.best, Evaluated(step, value, loss)
        self.count += 1
        is_number = not math.isnan(value)
        improves = is_number and (
            before is None or self.plan.is_better(value, before.value, self.plan.threshold)
        )
        self.waited = 0 if improves else self.waited + 1
        is_best = is_number and (
            before is None
            or self.plan.is_better(value, before.value)
            or (value == before.value and loss < before.loss)
        )
        if is_best:
            self.best = self.last
        return is_best

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add the evaluations in the log `records`, except that of the untrained model."""
        for record in records:
            if record["step"] > 0 and "eval_loss" in record:
                self.add(record["step"], record)

    @property
    def is_over(self) -> bool:
        """Whether `patience` evaluations have passed without improvement."""
        return self.plan.patience is not None and self.waited >= self.plan.patience


@dataclass(frozen=True, kw_only=True)
class SelectedModel:
    """The model of step `step` that a run ends with, and the evaluations that selected it.

    `waited` counts the evaluations since an improvement larger than the threshold.
    """

    metric: str
    greater_is_better: bool
    evaluations: int
    best: Evaluated
    last: Evaluated
    step: int
    stopped_early: bool
    patience: int | None
    waited: int

    def describe(self) -> dict[str, Any]:
        """Return the `best` section of summary.json."""
        return {
            "metric": self.metric,
            "greater_is_better": self.greater_is_better,
            "evaluations": self.evaluations,
            "kept_step": self.step,
            "best_step": self.best.step,
            "best": self.best.value,
            "last_step": self.last.step,
            "last": self.last.value,
            "stopped_early": self.stopped_early,
            "patience": self.patience,
            "waited": self.waited,
        }


def write_trained(model: Any, directory: Path) -> None:
    """Write the trainable tensors of `model`, one at a time to avoid a second copy in memory."""
    parts = [
        TensorPart({name: spec_of(tensor)}, functools.partial(dict, {name: tensor}))
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    ]
    write_file(directory / _WEIGHTS, parts)


def read_trained(model: Any, directory: Path) -> None:
    """Load the tensors written by `write_trained` into `model` (mutated), bit for bit.

    `Trainer._load_best_model` is not used: it loads a checkpoint with PEFT, which fails for prompt
    tuning, prunes AdaLoRA by ranks that its config does not have yet, and ignores ftlevel's float32
    heads. Names that differ from the trainable parameters' raise ValueError.
    """
    stored, _ = read_header(directory / _WEIGHTS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if stored.keys() != trained.keys():
        odd = sorted(stored.keys() ^ trained.keys())[0]
        raise ValueError(f"{directory} holds other tensors than are trained, such as {odd}")
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(stored[name].read())


class BestModelCallback(TrainerCallback):
    """Save the trainable tensors at each evaluation that is the best so far.

    `load_best_model_at_end` is not used: it needs a full checkpoint with optimizer state at each
    evaluation. The save strategy `best` sets `should_save` to False at all other evaluations, even
    if the run is interrupted there. `EarlyStoppingCallback` needs the former and loses its count on
    resume. This callback rebuilds the count from the log.
    """

    def __init__(
        self,
        plan: BestModel,
        directory: Path,
        processes: Processes,
        states: Sequence[HasState],
        listener: Listener,
    ) -> None:
        self.plan = plan
        self.directory = directory
        self.evaluations = Evaluations(plan)
        self._is_first = processes.is_first
        self._states = states
        self._listener = listener
        self._has_ended = False
        self._is_owed = False

    def resume(self, step: int, past: Sequence[Mapping[str, Any]], *, has_new_length: bool) -> None:
        """Restore the state at the checkpoint of `step` from the log records `past`.

        Best models of later steps are deleted. With `has_new_length`, a run that had stopped early
        continues.
        """
        if self._is_first:
            delete_best_after(self.directory, step)
        self.evaluations.replay(past)
        best, last = self.evaluations.best, self.evaluations.last
        has_ended = self.evaluations.is_over and last is not None and last.step == step
        self._has_ended = has_ended and not has_new_length
        if best is None or not self.plan.loads:
            return
        damage = find_damage(best_of(self.directory, best.step))
        if damage and best.step == step:  # the checkpoint has the same weights
            self._is_owed = True
        elif damage:
            self._listener.warn(
                f"best-{best.step}: {damage}; the model that was the best before is forgotten, and "
                "the best of the evaluations to come is kept"
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
        """Rewrite a damaged best model, and stop a run that had already stopped early."""
        if self._is_owed and self._is_first:
            write_best(self.directory, state.global_step, lambda to: self._write(model, to))
        control.should_training_stop |= self._has_ended

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Record the evaluation, save the model if it is the best, and stop if patience is over."""
        if state.global_step == 0:  # the model is untrained
            return
        if self.evaluations.add(state.global_step, metrics or {}):
            control.should_save |= self.plan.saves
            # The last model is in memory; write it only with a checkpoint to resume from.
            is_needed = state.global_step < state.max_steps or control.should_save
            if self.plan.loads and self._is_first and is_needed:
                write_best(self.directory, state.global_step, lambda to: self._write(model, to))
        control.should_training_stop |= self.evaluations.is_over

    def _write(self, model: Any, directory: Path) -> None:
        write_trained(model, directory)
        for state in self._states:
            state.keep(directory)

    def finish(self, model: Any, step: int, max_steps: int) -> SelectedModel | None:
        """Load the best weights into `model` (mutated) and return which model it is now.

        `step` is the last step made, `max_steps` the planned number. Returns None without a best
        evaluation.
        """
        seen, kept = self.evaluations, step
        if seen.best is None or seen.last is None:
            return None
        if self.plan.loads and seen.best.step != step:
            directory = best_of(self.directory, seen.best.step)
            if damage := find_damage(directory):
                self._listener.warn(f"{directory.name}: {damage}; the last model is kept instead")
            else:
                read_trained(model, directory)
                for state in self._states:
                    state.take_up(directory, model)
                kept = seen.best.step
        return SelectedModel(
            metric=self.plan.metric,
            greater_is_better=self.plan.greater_is_better,
            evaluations=seen.count,
            best=seen.best,
            last=seen.last,
            step=kept,
            stopped_early=seen.is_over and step < max_steps,
            patience=self.plan.patience,
            waited=seen.waited,
        )


MOST_ROWS = 10_000  # above this, per-row results are not stored


class PredictionRecorder(TrainerCallback):
    """Record per-row results of evaluations; store those of the first, best and last one.

    Must be registered after `BestModelCallback`, which selects the best evaluation.
    """

    def __init__(self, objective: Objective, best: BestModelCallback | None) -> None:
        self._objective = objective
        self._best = best
        self._now: ExampleRecord | None = None
        self._kept: dict[int, ExampleRecord] = {}

    def begin(self) -> ExampleRecord:
        """Return a new record for the next evaluation."""
        self._now = ExampleRecord(self._objective)
        return self._now

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Store the record, and drop all but those of step 0, the best and the current step."""
        best = self._best.evaluations.best if self._best else None
        wanted = {0, state.global_step, best.step if best else None}
        if self._now is not None:
            self._kept[state.global_step] = self._now
        self._kept = {step: record for step, record in self._kept.items() if step in wanted}

    def of(self, step: int) -> ExampleRecord | None:
        """Return the record of the evaluation at `step`; None if this process has none."""
        return self._kept.get(step)
