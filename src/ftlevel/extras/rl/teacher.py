"""Log-probabilities of sampled completions by the teacher of on-policy distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftlevel.events import Listener
from ftlevel.extras.rl.rollouts import compute_token_logps
from ftlevel.extras.rl.rows import CompletionRow
from ftlevel.models.hardware import autocast
from ftlevel.trained.resolve import ReferenceModel
from ftlevel.training.model import PreparedModel
from ftlevel.training.plan.run import Run
from ftlevel.training.reference import iterate_batches, load_auxiliary_model


class TeacherScorer:
    """Computes a teacher's log-probabilities of completions; the first call loads the teacher."""

    def __init__(self, teacher: ReferenceModel, run: Run, listener: Listener) -> None:
        self.teacher = teacher
        self._run = run
        self._context = load_auxiliary_model(teacher, run, listener)
        self._loaded: tuple[Run, PreparedModel] | None = None

    def __call__(self, rows: Sequence[CompletionRow]) -> list[list[float]]:
        """Returns the teacher's log-probability of each completion token, in one list per row."""
        objective: Any = self._run.objective
        if not rows:
            return []
        self._loaded = self._loaded or self._context.__enter__()
        run, adapted = self._loaded
        head = adapted.fast.cross_entropy if adapted.fast is not None else None
        with autocast(run.model.device, run.model.dtype):
            batches = iterate_batches(run, adapted.fast, rows)
            logps = compute_token_logps(adapted.model, objective, batches, head)
        return [logps[index] for index in range(len(rows))]
