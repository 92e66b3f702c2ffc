"""Reference log-probabilities of a trained policy, for rows that it was not trained on.

The reference is the base with the adapter disabled, the initial adapter saved by the run, or the
model that `--reference` named. It is measured before the policy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlevel.evaluation.likelihoods import compute_likelihoods
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.task import LikelihoodObjective
from ftlevel.trained.another import NAMED, resolve_recorded_reference
from ftlevel.trained.load import LoadedModel, load_ref
from ftlevel.trained.model_ref import ModelRef, card_directory, find_base

KEPT = "reference"
"""Folder next to an adapter, with the initial adapter or the name of the reference model."""


def needs_reference(evaluator: Evaluator) -> bool:
    """Return whether the objective compares rows with a reference."""
    objective = evaluator.objective
    return isinstance(objective, LikelihoodObjective) and objective.needs_reference


def with_reference(evaluator: Evaluator, trained: LoadedModel, found: ModelRef) -> Evaluator:
    """Return `evaluator` with reference log-probabilities in its rows, if these are needed."""
    if not needs_reference(evaluator):
        return evaluator
    task: Any = trained.task
    reference = _measure(evaluator, trained, found)
    return replace(evaluator, rows=task.with_reference(evaluator.rows, reference))


def _measure(evaluator: Evaluator, trained: LoadedModel, found: ModelRef) -> Any:
    directory = found.directory or Path(found.source.location)
    if (directory / KEPT / NAMED).is_file():
        other = resolve_recorded_reference(directory / KEPT, directory, evaluator.device)
        return _of_another(evaluator, other.in_precision(evaluator.dtype).found)
    if found.directory is not None and (directory / KEPT).is_dir():
        return _of_another(evaluator, replace(found, directory=directory / KEPT))
    if trained.has_adapter:
        with trained.model.disable_adapter():
            return compute_likelihoods(evaluator, trained.model)
    directory = card_directory(directory) or directory
    return _of_another(evaluator, replace(found, source=find_base(found.card, directory)))


def _of_another(evaluator: Evaluator, found: ModelRef) -> Any:
    return compute_likelihoods(evaluator, load_ref(found, evaluator.device).model)
