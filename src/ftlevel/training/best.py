"""Keep the model of the best evaluation, and end a run that gets no better.

The best evaluation of a run so far: which it is, and the weights that it was made of.

Keep what evaluations find row by row: of the first, the best and the last of them.
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

from ftlevel.artifacts.checkpoints import best_of, find_damage, forget_later, write_best
from ftlevel.evaluation.intervals import PerRow
from ftlevel.events import Listener
from ftlevel.methods.base import HasState
from ftlevel.task import Objective
from ftlevel.training.plan.best_model import BestModel
from ftlevel.training.processes import Processes
from ftlevel.weights.tensor_files import Part, read_header, spec_of, write_file

_WEIGHTS = "trained.safetensors"


@dataclass(frozen=True)
class Evaluated:
    """A step, and the values of the metric and of the loss there."""

    step: int
    value: float
    loss: float = math.nan


class Evaluations:
    """The evaluations of a run, one after another.

    Attributes:
        best: the best so far; None before the first that is a number.
        last: the last.
        count: how many there were.
        waited: how many there were since one was better by more than the threshold.
    """

    def __init__(self, plan: BestModel) -> None:
        self.plan = plan
        self.best: Evaluated | None = None
        self.last: Evaluated | None = None
        self.count = 0
        self.waited = 0

    def add(self, step: int, scores: Mapping[str, Any]) -> bool:
        """Add an evaluation and return whether it is the best so far.

        Of equal ones it is that with the lower loss: a few rows tell accuracies apart coarsely.
        A metric that is missing, as a correlation with a constant is, is no number.
        """
        value = float(scores.get(self.plan.metric, math.nan))
        loss = float(scores.get("eval_loss", math.nan))
        before, self.last = self.best, Evaluated(step, value, loss)
        self.count += 1
        far = before is None or self.plan.is_better(value, before.value, self.plan.threshold)
        self.waited = 0 if far else self.waited + 1
        is_best = not math.isnan(value) and (
            before is None
            or self.plan.is_better(value, before.value)
            or (value == before.value and loss < before.loss)
        )
        if is_best:
            self.best = self.last
        return is_best

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add the evaluations among `records` of a log; that of the untrained model is none."""
        for record in records:
            if record["step"] > 0 and "eval_loss" in record:
                self.add(record["step"], record)

    @property
    def is_over(self) -> bool:
        """Whether the run has waited long enough for a better one."""
        return self.plan.patience is not None and self.waited >= self.plan.patience


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which model a run ends with.

    Attributes:
        metric: by which the evaluations were compared, with `eval_`.
        greater_is_better: whether the highest is the best.
        evaluations: how many there were.
        best: the best of them.
        last: the last.
        step: of the model that is kept.
        stopped_early: whether the run ended because none was better for long.
        patience: for how many.
        waited: evaluations since the last one that was better by more than the threshold.
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
        """Return what summary.json says of it."""
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
    """Write the trained tensors of `model`, one at a time, so that none is held twice."""
    parts = [
        Part({name: spec_of(tensor)}, functools.partial(dict, {name: tensor}))
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    ]
    write_file(directory / _WEIGHTS, parts)


def read_trained(model: Any, directory: Path) -> None:
    """Put the tensors that `write_trained` wrote into `model` (mutated), one at a time.

    Bit for bit: no adapter is rebuilt. `Trainer._load_best_model` would have PEFT load a
    checkpoint, which fails for prompts, prunes AdaLoRA by ranks that its config does not have yet,
    and does not know the heads that ours hold in float32.
    """
    stored, _ = read_header(directory / _WEIGHTS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if stored.keys() != trained.keys():
        odd = sorted(stored.keys() ^ trained.keys())[0]
        raise ValueError(f"{directory} holds other tensors than are trained, such as {odd}")
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(stored[name].read())


class KeepBest(TrainerCallback):
    """Write the trained tensors at each evaluation that is the best so far.

    Trainer's own way is not used, for three reasons. Its `load_best_model_at_end` wants a whole
    checkpoint, with the optimizer, at each evaluation, and loads it by PEFT. Its strategy `best`
    sets `should_save` to False at all other evaluations, one at which the run is interrupted too.
    Its `EarlyStoppingCallback` needs the first of these, and forgets what it has counted when a run
    goes on. What was best is read off the log instead, which is rewound to the checkpoint.

    Args:
        plan: how the best is told.
        directory: of the checkpoints.
        processes: those of the run, which all see the same metrics; the first writes.
        states: what belongs to the model beside its tensors.
        listener: is told of a best model that is damaged.
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

    def go_on(self, step: int, past: Sequence[Mapping[str, Any]], *, has_new_length: bool) -> None:
        """Go on from the checkpoint of `step`: what came later is forgotten.

        Args:
            step: of the checkpoint.
            past: what was logged until then.
            has_new_length: whether the run is to end at another step than it was.
        """
        if self._is_first:
            forget_later(self.directory, step)
        self.evaluations.replay(past)
        best, last = self.evaluations.best, self.evaluations.last
        has_ended = self.evaluations.is_over and last is not None and last.step == step
        self._has_ended = has_ended and not has_new_length
        if best is None or not self.plan.loads:
            return
        damage = find_damage(best_of(self.directory, best.step))
        if damage and best.step == step:  # that model is the checkpoint's
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
        """End a run that had waited long enough when it was broken off."""
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
        """Compare, write what is the best, and stop if it is time."""
        if state.global_step == 0:  # nothing is trained yet
            return
        if self.evaluations.add(state.global_step, metrics or {}):
            control.should_save |= self.plan.saves
            # The last model is in memory anyhow, unless somebody may go on from it.
            is_needed = state.global_step < state.max_steps or control.should_save
            if self.plan.loads and self._is_first and is_needed:
                write_best(self.directory, state.global_step, lambda to: self._write(model, to))
        control.should_training_stop |= self.evaluations.is_over

    def _write(self, model: Any, directory: Path) -> None:
        write_trained(model, directory)
        for state in self._states:
            state.keep(directory)

    def finish(self, model: Any, step: int, max_steps: int) -> Kept | None:
        """Put the best weights into `model` (mutated), and say which model it is now.

        Args:
            model: after its last step.
            step: that step.
            max_steps: what the run was to make.
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
        return Kept(
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


MOST_ROWS = 10_000  # beyond which nothing is kept


class KeepAnswers(TrainerCallback):
    """Gives each evaluation a record, and keeps those that the end of the run asks for.

    Args:
        objective: of the run.
        best: knows the best evaluation; it is told of each before this is.
    """

    def __init__(self, objective: Objective, best: KeepBest | None) -> None:
        self._objective = objective
        self._best = best
        self._now: PerRow | None = None
        self._kept: dict[int, PerRow] = {}

    def begin(self) -> PerRow:
        """Return the record of an evaluation that begins."""
        self._now = PerRow(self._objective)
        return self._now

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep the record, and forget those that are neither the first nor the best."""
        best = self._best.evaluations.best if self._best else None
        wanted = {0, state.global_step, best.step if best else None}
        if self._now is not None:
            self._kept[state.global_step] = self._now
        self._kept = {step: record for step, record in self._kept.items() if step in wanted}

    def of(self, step: int) -> PerRow | None:
        """Return what the evaluation after `step` found; None where it was not in this process."""
        return self._kept.get(step)
