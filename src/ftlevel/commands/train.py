"""Train: resolve → load → adapt → train → save → prove. Whoever reads this has read the product."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.claim import claimed
from ftlevel.artifacts.recipe import describe_recipe
from ftlevel.artifacts.run_directory import RunDirectory, check_output
from ftlevel.config import PredictConfig, TrainConfig, build_section
from ftlevel.errors import ConfigError, Interrupted
from ftlevel.events import Listener, Silence
from ftlevel.models.loading import quiet_libraries
from ftlevel.training.build_trainer import add_callbacks, build_trainer, go_on
from ftlevel.training.disk import explain_disk_errors
from ftlevel.training.fast_step import describe_speed
from ftlevel.training.finish import (
    end_training,
    keep_best,
    measure_times,
    save,
    write_results,
)
from ftlevel.training.interrupted import describe_end, describe_stop, telling_what_is_kept
from ftlevel.training.model import load_adapted
from ftlevel.training.plan.adapter import take_adapter
from ftlevel.training.plan.adapter_form import find_adapter_warnings
from ftlevel.training.plan.packages import check_packages
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.resolve import resolve
from ftlevel.training.plan.schedule import find_warnings
from ftlevel.training.plan.task_choice import choose_task
from ftlevel.training.plan.trainable import size_choices
from ftlevel.training.processes import Processes, resolve_processes, started_processes
from ftlevel.training.proof import prove
from ftlevel.training.resume import find_going_on, open_or_go_on, origin_of
from ftlevel.training.summary import (
    Outcome,
    build_summary,
    describe_base,
    find_nothing_learned,
    find_worse_than_before,
    resolved_config,
)
from ftlevel.training.verify.proof import verify_step


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        summary: what summary.json holds.
        path: the run directory; None after a dry run.
        model: the trained model, on its device; None after a dry run, or of a run that was
            finished before.
        tokenizer: its tokenizer.
    """

    summary: Mapping[str, Any]
    path: Path | None
    model: Any
    tokenizer: Any

    def predict(self, rows: Iterable[Mapping[str, Any]], **settings: Any) -> list[dict[str, Any]]:
        """Return `rows` with the answers of the saved run; `settings` are of `PredictConfig`.

        Raises:
            ConfigError: nothing was trained.
        """
        from ftlevel.commands.predict import predict

        if self.path is None:
            raise ConfigError("a dry run has nothing to predict with. Train without dry_run.")
        config = build_section(PredictConfig, {"name": str(self.path), **settings})
        return predict(config, rows).rows or []


def train(
    config: TrainConfig,
    *,
    listener: Listener | None = None,
    dry_run: bool = False,
    recipe: Path | None = None,
) -> TrainResult:
    """Fine-tune as `config` says and write a run directory.

    Args:
        config: the whole configuration.
        listener: told of the run's course; nobody by default.
        dry_run: resolve and check everything, train and write nothing.
        recipe: the file that `config` was read from, to be named in summary.json.

    Raises:
        ConfigError: something is wrong that can be known before weights load.
        RunError: training failed: a gradient that is missing or not finite, a saved adapter that
            is not the trained one.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"train() was given {type(config).__name__}. Expected a TrainConfig, as "
            "TrainConfig(task=…), or FineTunePipeLine(args_dir=FILE).config for a recipe."
        )
    listener = listener or Silence()
    processes = started_processes()
    config = resolve_processes(config, processes, rows_only=dry_run)
    output = config.output
    check_output(output.dir, overwrite=output.overwrite, resume=output.resume)
    check_packages(config)
    origin = describe_recipe(recipe) if recipe else None
    with quiet_libraries():
        listener.stage("read the data and the model's shape")
        config, adapter, notes = take_adapter(config)
        config, why = choose_task(config)
        plan = resolve(config, progress=listener.progress, why_task=why, adapter=adapter)
        notes += find_adapter_warnings(adapter, config, plan) if adapter else []
        for note in notes:
            listener.warn(note)
        listener.choices("train", [*plan.choices, *size_choices(config, plan, try_method=dry_run)])
        data = plan.data
        sizes, new_head = (len(data.train), len(data.validation)), bool(plan.model.new_heads)
        for warning in find_warnings(config.train, *sizes, new_head=new_head):
            listener.warn(warning)
        if dry_run:
            summary = {"dry_run": True, "steps": plan.schedule.steps, "data": data.facts,
                       "targets": plan.targets.modules,
                       "config": resolved_config(config, plan)}  # fmt: skip
            listener.end(summary)
            return TrainResult(summary, None, None, plan.model.tokenizer)
        with contextlib.ExitStack() as held:
            return _train(config, plan, listener, origin, processes, held)


def _train(
    config: TrainConfig,
    plan: Plan,
    listener: Listener,
    recipe: Mapping[str, Any] | None,
    processes: Processes,
    held: contextlib.ExitStack,
) -> TrainResult:
    processes.join(plan.model.device)
    base = describe_base(plan.model.source)
    origin = origin_of(config, plan, base)
    going_on = processes.from_first(lambda: find_going_on(config, plan, origin, listener))
    if (summary := going_on.finished) is not None:
        listener.end({**summary, "nothing_left": describe_end(config, summary)})
        return TrainResult(summary, config.output.dir, None, plan.model.tokenizer)
    listener.stage("load the model")
    adapted = load_adapted(config, plan, listener)
    verified = verify_step(config, plan, adapted, listener)
    run = processes.from_first(lambda: open_or_go_on(config, plan, origin, going_on))
    if processes.is_first:
        held.enter_context(claimed(run.path))
    held.enter_context(telling_what_is_kept(run))
    trainer = build_trainer(config, plan, adapted, run, going_on, processes)
    watch = add_callbacks(trainer, config, plan, run, listener, processes)
    go_on(watch, run, going_on, processes)
    checkpoint = going_on.checkpoint

    listener.stage("train")
    with watch.interrupt, explain_disk_errors(run):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if watch.interrupt.has_stopped:
        raise Interrupted(describe_stop(run, trainer.state))
    kept = keep_best(trainer, watch.best)
    if not processes.is_first:
        return TrainResult({}, run.path, adapted.model, plan.model.tokenizer)
    trained_at = time.perf_counter()
    plan = end_training(trainer, plan, watch.report.records)

    listener.stage("save and check")
    with explain_disk_errors(run):
        save(adapted, config, plan, run, base)
    outcome = Outcome(
        run=run.path,
        recipe=recipe,
        base=base,
        model=adapted.model,
        records=watch.report.records,
        proof=prove(adapted.model, config, plan, run, watch.gradients),
        timings=measure_times(watch.report, trained_at, int(trainer.tokens_seen)),
        generated_rows=trainer.evaluator.generated_rows if trainer.evaluator else 0,
        speed=describe_speed(trainer, asdict(verified) if verified else None),
        kept=kept,
    )
    summary = _tell(config, plan, outcome, run, listener)
    return TrainResult(summary, run.path, adapted.model, plan.model.tokenizer)


def _tell(
    config: TrainConfig, plan: Plan, outcome: Outcome, run: RunDirectory, listener: Listener
) -> Mapping[str, Any]:
    """Write what the run gave, say it, and return it."""
    summary = build_summary(config, plan, outcome)
    with explain_disk_errors(run):
        write_results(run, config, summary)
    for warning in [*find_nothing_learned(summary, plan), *find_worse_than_before(summary)]:
        listener.warn(warning)
    listener.end(summary)
    return summary
