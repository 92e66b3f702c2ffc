"""Keep what evaluations find row by row: of the first, the best and the last of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.evaluation.intervals import PerRow
from ftlevel.task import Objective
from ftlevel.training.callbacks.keep_best import KeepBest

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
