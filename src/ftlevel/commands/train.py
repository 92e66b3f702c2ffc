"""`train`: resolve the run, load and adapt the model, train, save, and verify what was saved."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config import PredictConfig, TrainConfig, build_section
from ftlevel.errors import ConfigError
from ftlevel.events import Listener, Summarized, default_listener
from ftlevel.models.loading import silence_loggers
from ftlevel.training.finish import StartTime
from ftlevel.training.memory import explain_out_of_memory
from ftlevel.training.model import load_training_model
from ftlevel.training.resume import resolve_resume
from ftlevel.training.session import (
    CommandLine,
    TrainingJob,
    TrainInputs,
    bind_inputs,
    end_finished,
    open_session,
    prepare_run,
    resolve_job,
)
from ftlevel.training.summary import resolved_config

if TYPE_CHECKING:  # importing it would print messages before loggers are silenced
    from transformers import TrainerCallback


@dataclass(frozen=True, repr=False)
class TrainResult(Summarized):
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

    prepared = prepare_run(job, resumed, load_training_model)
    session = open_session(job, prepared, resumed, stack)
    session.train()
    session.evaluate()
    summary: Mapping[str, Any] = {}
    if job.processes.is_first or session.is_sharded:
        session.save()
        proof = session.verify()
        if job.processes.is_first:
            summary = session.report(proof)
    return TrainResult(summary, session.output_dir.path, session.model.model, tokenizer)


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
