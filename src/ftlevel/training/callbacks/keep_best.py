"""Keep the model of the best evaluation, and end a run that gets no better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts.best_models import best_of, forget_later, write_best
from ftlevel.artifacts.checkpoints import find_damage
from ftlevel.events import Listener
from ftlevel.methods.base import HasState
from ftlevel.training.best import Evaluations, Kept, read_trained, write_trained
from ftlevel.training.plan.best_model import BestModel
from ftlevel.training.processes import Processes


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
