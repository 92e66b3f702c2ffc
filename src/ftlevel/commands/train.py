"""`train`: resolve the run, load and adapt the model, train, save, and verify what was saved."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import PredictConfig, TrainConfig, build_section
from ftlevel.errors import ConfigError
from ftlevel.events import Listener, default_listener
from ftlevel.fast.plan import plan_plain
from ftlevel.models.hardware import free_device_memory, resident_bytes
from ftlevel.models.loading import silence_loggers
from ftlevel.training.finish import StartTime
from ftlevel.training.memory import explain_out_of_memory
from ftlevel.training.model import load_training_model
from ftlevel.training.plan.run import Run
from ftlevel.training.reference import compute_initial_reference, precompute_reference
from ftlevel.training.resume import ResumeState, resolve_resume
from ftlevel.training.session import (
    CommandLine,
    PreparedRun,
    TrainingJob,
    TrainInputs,
    bind_inputs,
    end_finished,
    open_session,
    resolve_job,
    with_checkpointing,
)
from ftlevel.training.step_comparison import FastStepError
from ftlevel.training.summary import resolved_config
from ftlevel.training.teacher import AuxiliaryOutputs, create_scorer, precompute_teacher
from ftlevel.training.text_models import with_text_models
from ftlevel.training.verify import check_fast_step

if TYPE_CHECKING:  # importing it would print messages before loggers are silenced
    from transformers import TrainerCallback


@dataclass(frozen=True)
class TrainResult:
    """Result of a run; `path` and `model` are None after a dry run.

    `model` is also None if the run was already complete.
    """

    summary: Mapping[str, Any]
    path: Path | None
    model: Any
    tokenizer: Any

    def predict(self, rows: Any, **settings: Any) -> list[dict[str, Any]]:
        """Returns `rows` with the model's answers; `settings` are fields of `PredictConfig`.

        Raises ConfigError after a dry run.
        """
        from ftlevel.commands.predict import predict

        if self.path is None:
            raise ConfigError("a dry run has nothing to predict with. Train without dry_run.")
        config = build_section(PredictConfig, {"name": str(self.path), **settings})
        return predict(config, rows).rows or []


def train(
    config: TrainConfig,
    dataset: Any = None,
    *,
    eval_dataset: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    dry_run: bool = False,
    listener: Listener | None = None,
    command_line: CommandLine | None = None,
) -> TrainResult:
    """Fine-tune as `config` specifies, and write a run directory.

    Rows and models passed as objects are processed like files.

    Args:
        config: configuration of the run.
        dataset: training rows instead of `config.data.dataset`: a DataFrame, a `datasets.Dataset`
            or DatasetDict, a list of dicts, or a file name.
        eval_dataset: validation rows, in the same forms.
        model: transformers model without an adapter, instead of `config.model`. It is not modified:
            the weights are reloaded from their source, or saved in the run.
        tokenizer: tokenizer of `model`; default: the one at the model's name or path.
        callbacks: `transformers.TrainerCallback` instances, called after ftlevel's own.
        dry_run: resolve and check everything; train and write nothing.
        listener: receives progress; by default printed in a notebook, elsewhere only warnings are
            logged.
        command_line: set by the command-line interface.

    Raises:
        ConfigError: a problem that is known before weights load.
        RunError: training failed: a missing or non-finite gradient, or a saved adapter that differs
            from the trained one.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"train() was given {type(config).__name__}. Expected a TrainConfig, as "
            "TrainConfig(task=…), or FineTunePipeLine(args_dir=FILE).config for a recipe."
        )
    command_line = command_line or CommandLine(None, StartTime.now())
    listener = listener or default_listener()
    objects = TrainInputs(dataset, eval_dataset, model, tokenizer, callbacks)
    with contextlib.ExitStack() as stack:
        stack.enter_context(silence_loggers())
        inputs = bind_inputs(config, objects, stack)
        job = resolve_job(inputs, command_line, listener, dry_run=dry_run)
        if dry_run:
            return _end_dry_run(job)
        stack.enter_context(explain_out_of_memory(job.run))
        return _train(job, stack)


def _train(job: TrainingJob, stack: contextlib.ExitStack) -> TrainResult:
    """Load, adapt, train, save and verify; the summary is empty in all processes but the first."""
    tokenizer = job.run.model.tokenizer
    resumed = resolve_resume(job.run, job.processes, job.listener)
    if resumed.finished is not None and job.run.config.output.dir is not None:
        directory = RunDirectory(job.run.config.output.dir)
        end_finished(job, directory, resumed.finished)
        return TrainResult(resumed.finished, directory.path, None, tokenizer)

    session = open_session(job, _prepare_run(job, resumed), resumed, stack)
    session.train()
    summary: Mapping[str, Any] = {}
    if job.processes.is_first or session.is_sharded:
        session.evaluate()
        session.save()
        proof = session.verify()
        if job.processes.is_first:
            summary = session.report(proof)
    return TrainResult(summary, session.output_dir.path, session.model.model, tokenizer)


def _prepare_run(job: TrainingJob, resumed: ResumeState) -> PreparedRun:
    """Compute the outputs of auxiliary models, load the model, and verify its fast step.

    If the fast step is not the plain one, or was not when the run to resume started, the run is
    prepared again for the plain step; with `--verify-fast`, FastStepError is raised instead.
    """
    initial_memory, failure, when = resident_bytes(), resumed.failure, " when the run started"
    if not failure:
        try:
            return _load(job, job.run, initial_memory)
        except FastStepError as error:
            if job.run.config.speed.verify:
                raise
            failure, when = error.problem, ""
        free_device_memory()
    report = "" if when else " Please report this with the command."
    job.listener.warn(f"fast step disabled{when}: {failure}; training with the plain step.{report}")
    plan = replace(plan_plain(job.run.objective, job.run.fast.tokens), failure=failure)
    run = with_checkpointing(replace(job.run, fast=plan), job.processes, job.listener)
    return _load(job, run, initial_memory)


def _load(job: TrainingJob, run: Run, initial_memory: int) -> PreparedRun:
    listener = job.listener
    run, reference = precompute_reference(with_text_models(run, listener), listener)
    teacher = precompute_teacher(run, listener)
    listener.stage("loading the model")
    model = load_training_model(run, listener)
    if reference is None:
        run, reference = compute_initial_reference(run, model, listener)
    if teacher is not None:
        run = replace(run, data=replace(run.data, train=teacher.rows))
    auxiliary = AuxiliaryOutputs(reference, teacher, create_scorer(run, listener))
    try:
        comparison = check_fast_step(run, model, job.processes, listener)
    except FastStepError:
        if model.fast is not None:
            model.fast.remove()
        raise
    return PreparedRun(run, model, auxiliary, comparison, initial_memory)


def _end_dry_run(job: TrainingJob) -> TrainResult:
    run = job.run
    summary = {
        "dry_run": True,
        "steps": run.schedule.steps,
        "data": run.data.info,
        "headline": run.objective.headline,
        "targets": run.targets.modules,
        "config": resolved_config(run),
    }
    job.listener.end(summary)
    return TrainResult(summary, None, None, run.model.tokenizer)
