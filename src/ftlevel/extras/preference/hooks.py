"""What `--task preference` changes in training and evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from ftlevel.evaluation.scoring import Evaluator
from ftlevel.events import Listener
from ftlevel.extras.preference.config import PreferenceConfig
from ftlevel.extras.preference.likelihoods import (
    FOLDER,
    LABELS,
    PreferenceEvaluator,
    check_first_loss,
    compute_initial_reference,
    get_contrasts,
    precompute_reference,
    sum_log_ratios,
    with_baseline,
    with_reference,
)
from ftlevel.trained.model_ref import LoadedModel, ModelRef
from ftlevel.training.hooks import EvaluationHooks, TrainingHooks
from ftlevel.training.model import PreparedModel
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes
from ftlevel.training.trainer import FtlevelTrainer

_REFERENCE = "preference.reference"


class PreferenceHooks(TrainingHooks):
    """Hooks of `--task preference`; `Run.resources` is the `Reference`, None without one."""

    evaluator: ClassVar[type[Evaluator]] = PreferenceEvaluator

    def get_auxiliary_names(self, run: Run) -> Mapping[str, str | None]:
        """Returns the reference model, if it is not the initial one."""
        return {_REFERENCE: run.config.get_section(PreferenceConfig).other_reference}

    def with_auxiliary_outputs(self, run: Run, listener: Listener, processes: Processes) -> Run:
        """Returns the run with log-probabilities of the `--reference` model in its rows, if any."""
        reference = run.auxiliary.get(_REFERENCE)
        return precompute_reference(run, reference, listener, processes) if reference else run

    def with_initial_outputs(
        self, run: Run, model: PreparedModel, listener: Listener, processes: Processes
    ) -> Run:
        """Returns the run with log-probabilities of the initial model in its rows, if needed."""
        objective: Any = run.objective
        if _REFERENCE in run.auxiliary or not objective.needs_reference:
            return run
        return compute_initial_reference(run, model, listener, processes)

    def select_trainer(
        self, run: Run, sampler: Any, rows: Any, order: Any
    ) -> tuple[Any, dict[str, Any], Any]:
        """Returns `KtoTrainer` if the loss needs a baseline."""
        objective: Any = run.objective
        return KtoTrainer if objective.needs_baseline else None, {}, order

    def save_files(self, run: Run, directory: Path) -> None:
        """Save the initial adapter, or the name of the reference model, if it is not the base."""
        if run.resources is not None and run.resources.files is not None:
            shutil.copytree(run.resources.files.name, directory / FOLDER, dirs_exist_ok=True)

    def describe(
        self, run: Run, records: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Returns the reference, and a note that explains an unexpected first loss."""
        if run.resources is None:
            return {}, []
        info, notes = check_first_loss(run.resources, run, records)
        return {"reference": info}, notes

    def evaluation(self, ref: ModelRef, options: Mapping[str, Any]) -> EvaluationHooks:
        """Returns the evaluation with log-probabilities of the reference, if it is needed."""
        objective: Any = ref.objective
        kind = _ReferenceEvaluation if objective.needs_reference else EvaluationHooks
        return kind(self.evaluator)


class _ReferenceEvaluation(EvaluationHooks):
    stage = "running the reference model"

    def create_evaluator(
        self, trained: LoadedModel, eval_rows: Any, seed: int, settings: Mapping[str, Any]
    ) -> Evaluator:
        return with_reference(PreferenceEvaluator(**settings), trained)


class KtoTrainer(FtlevelTrainer):
    """Trainer that computes the baseline z of KTO before the micro-batches of a step."""

    _log_ratios: Tensor | None = None  # sum and number of the step's mismatched pairs

    def prepare_step(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        """Sum the log-ratios of the mismatched pairs of all processes."""
        contrasts = [
            send_to_device(part, device)
            for batch in batches
            if not batch.get("is_padding")
            for _, part in self.data_collator.split(get_contrasts(batch["rows"]))
        ]
        objective: Any = self.objective
        head = self.fast.cross_entropy if self.fast is not None else None
        with self.compute_loss_context_manager():
            total = sum_log_ratios(head, self.model, objective, contrasts).to(device)
        if self.args.world_size > 1 and not self.is_standalone:
            total = self._sum_over_processes(total)
        self._log_ratios = total
        self._in_training = False

    def prepare_plain(self, batches: Sequence[Any], rows: Sequence[Any], collate: Any) -> None:
        """Set the baseline in the labels of `batches` (modified)."""
        objective: Any = self.objective
        total = sum_log_ratios(None, self.model, objective, collate(get_contrasts(rows)))
        for batch in batches:
            batch[LABELS] = with_baseline(batch[LABELS], total)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], *arguments: Any, **named: Any
    ) -> Any:
        """Returns the micro-batch's loss with the baseline of the step."""
        if self._log_ratios is not None:
            inputs = {**inputs, LABELS: with_baseline(inputs[LABELS], self._log_ratios)}
        return super().compute_loss(model, inputs, *arguments, **named)
