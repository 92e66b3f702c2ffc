"""`train`: resolve the run, load and adapt the model, train, save, and verify what was saved."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlevel.artifacts.run_directory import get_recipe_info
from ftlevel.config import PredictConfig, TrainConfig, build_section
from ftlevel.errors import ConfigError
from ftlevel.events import Listener, Summarized, default_listener
from ftlevel.models.loading import silence_loggers
from ftlevel.training import finish
from ftlevel.training.memory import explain_out_of_memory
from ftlevel.training.model import load_training_model
from ftlevel.training.plan.run import Run
from ftlevel.training.session import StartTime, TrainingSession, TrainInputs
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
    recipe: Path | None = None,
    start: StartTime | None = None,
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
        recipe: recipe file of the command line.
        start: time at which the user started the run; default: now.

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
    listener, start = listener or default_listener(), start or StartTime.now()
    recipe_info = get_recipe_info(recipe) if recipe else None
    inputs = TrainInputs(
        config, dataset, eval_dataset, model, tokenizer, callbacks, recipe_info, start
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(silence_loggers())
        session = TrainingSession.start(inputs, listener, stack, dry_run=dry_run)
        if dry_run:
            return _end_dry_run(session.run, listener)
        stack.enter_context(explain_out_of_memory(session.run))
        return _train(session)


def _train(session: TrainingSession) -> TrainResult:
    """Load, adapt, train, save and verify; the summary is empty in all processes but the first."""
    tokenizer = session.run.model.tokenizer
    finished = session.resolve_resume()
    if finished is not None:
        return TrainResult(finished, session.run.config.output.dir, None, tokenizer)

    session.prepare(load_training_model)
    session.open()
    session.train()
    finish.evaluate(session)
    summary: Mapping[str, Any] = {}
    if session.processes.is_first or session.is_sharded:
        finish.save(session)
        proof = finish.verify(session)
        if session.processes.is_first:
            summary = finish.report(session, proof)
    return TrainResult(summary, session.output_dir.path, session.model.model, tokenizer)


def _end_dry_run(run: Run, listener: Listener) -> TrainResult:
    summary = {
        "dry_run": True,
        "steps": run.schedule.steps,
        "data": run.data.info,
        "headline": run.objective.headline,
        "targets": run.targets.modules,
        "config": resolved_config(run),
    }
    listener.end(summary)
    return TrainResult(summary, None, None, run.model.tokenizer)
