"""`train`: resolve the plan, load and adapt the model, train, save, and verify what was saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlevel.artifacts.hub import find_repository
from ftlevel.artifacts.ownership import mark_end_once, replace_run
from ftlevel.artifacts.run_directory import (
    RunDirectory,
    check_output,
    describe_recipe,
    lock_directory,
)
from ftlevel.config import PredictConfig, TrainConfig, build_section
from ftlevel.errors import ConfigError, Interrupted
from ftlevel.events import Listener
from ftlevel.models.hardware import release_freed_memory, resident_bytes
from ftlevel.models.loading import silence_loggers
from ftlevel.notebook import default_listener
from ftlevel.training.build_trainer import (
    add_callbacks,
    build_trainer,
    matmul_context,
    restore_progress,
)
from ftlevel.training.callbacks.gradients import select_skipped_steps
from ftlevel.training.callbacks.processes import WatchProcesses
from ftlevel.training.callbacks.saving import WaitForBytes, check_disk_space, explain_disk_errors
from ftlevel.training.callbacks.trackers import describe_run, tracking
from ftlevel.training.finish import (
    Start,
    end_training,
    keep_best,
    measure_times,
    report_results,
    save,
    write_tokenizer_and_card,
)
from ftlevel.training.forecast.fits import MemoryEstimate, estimate_memory
from ftlevel.training.forecast.micro_batch import choose_micro_batch
from ftlevel.training.given import BoundInputs, TrainInputs, bind_inputs, describe_taken, store_base
from ftlevel.training.memory import explain_out_of_memory
from ftlevel.training.model import describe_speed
from ftlevel.training.origin import FileDigests, digests_of, everything_of, origin_of
from ftlevel.training.plan.adapter import resolve_adapter
from ftlevel.training.plan.resolve import check_packages, infer_task, resolve
from ftlevel.training.plan.run import Run
from ftlevel.training.plan.schedule import find_default_model_warnings, find_warnings
from ftlevel.training.plan.trainable import find_adapter_warnings, size_choices
from ftlevel.training.processes import Processes, resolve_processes, started_processes
from ftlevel.training.proof import prove
from ftlevel.training.resume import (
    check_base_outlives,
    check_base_stays,
    check_shared,
    describe_end,
    describe_stop,
    explain_interrupt,
    open_or_resume,
    resolve_resume,
    stored_micro_batch_tokens,
    stored_prompt_version,
)
from ftlevel.training.rl.checks import check_before
from ftlevel.training.rl.trainer import RlTrainer
from ftlevel.training.sharding import check_can_shard, probe_untrained, prove_sharded, save_sharded
from ftlevel.training.summary import (
    Outcome,
    resolved_config,
)
from ftlevel.training.teacher import find_auxiliary_models, precompute_and_load
from ftlevel.training.verify.proof import verify_step

if TYPE_CHECKING:  # importing it would print messages before loggers are silenced
    from transformers import TrainerCallback


@dataclass(frozen=True)
class TrainResult:
    """Result of a run; `path` and `model` are None after a dry run.

    `model` is also None if the run had already finished.
    """

    summary: Mapping[str, Any]
    path: Path | None
    model: Any
    tokenizer: Any

    def predict(self, rows: Any, **settings: Any) -> list[dict[str, Any]]:
        """Return `rows` with answers of the saved run; `settings` are fields of `PredictConfig`.

        Raises:
            ConfigError: nothing was trained.
        """
        from ftlevel.commands.predict import predict

        if self.path is None:
            raise ConfigError("a dry run has nothing to predict with. Train without dry_run.")
        config = build_section(PredictConfig, {"name": str(self.path), **settings})
        return predict(config, rows).rows or []


@dataclass(frozen=True)
class CommandLine:
    """Recipe path and process start time of a run started from the command line."""

    recipe: Path | None
    start: Start


@dataclass(frozen=True)
class _Job:
    """A resolved and checked run, before weights load; `recipe` is its path and git state."""

    taken: BoundInputs
    run: Run
    listener: Listener
    callbacks: Sequence[TrainerCallback]
    recipe: Mapping[str, Any] | None
    processes: Processes
    start: Start
    memory_estimate: MemoryEstimate


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

    In-memory rows and models are processed like files.

    Args:
        config: configuration of the run.
        dataset: training rows instead of `config.data.dataset`: a DataFrame, a `datasets.Dataset`
            or DatasetDict, a list of dicts, or a file name.
        eval_dataset: validation rows, in the same forms.
        model: transformers model without an adapter, instead of `config.model`. It is not modified:
            its weights are reloaded from their source, or saved in the run.
        tokenizer: tokenizer of `model`, if not the one of its name.
        callbacks: `transformers.TrainerCallback` instances, called after ftlevel's own.
        dry_run: resolve and check everything; train and write nothing.
        listener: receives progress; by default shown in a notebook, elsewhere only warnings are
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
    command_line = command_line or CommandLine(None, Start.now())
    listener = listener or default_listener()
    with contextlib.ExitStack() as held:
        held.enter_context(silence_loggers())
        taken = bind_inputs(
            config, TrainInputs(dataset, eval_dataset, model, tokenizer, callbacks), held
        )
        job = _resolve_together(taken, command_line, listener, callbacks, dry_run=dry_run)
        if dry_run:
            job = _choose_micro_batch(job)
            run = job.run
            summary = {
                "dry_run": True,
                "steps": run.schedule.steps,
                "data": run.data.facts,
                "headline": run.objective.headline,
                "targets": run.targets.modules,
                "config": resolved_config(run),
            }
            listener.end(summary)
            return TrainResult(summary, None, None, run.model.tokenizer)
        held.enter_context(explain_out_of_memory(job.run))
        return _train(job, held)


def _resolve_together(
    taken: BoundInputs,
    command_line: CommandLine,
    listener: Listener,
    callbacks: Sequence[TrainerCallback],
    *,
    dry_run: bool,
) -> _Job:
    """Resolve the run in every process; a failure in one is raised in all."""
    processes = started_processes()
    train = resolve_processes(taken.config.train, processes, rows_only=dry_run)
    config = taken.config.model_copy(update={"train": train})
    if dry_run:  # one process is enough
        processes = Processes()
    processes.join()
    resolved = replace(taken, config=config)

    def resolve_here() -> _Job:
        job = _resolve(resolved, command_line, listener, callbacks, processes, try_method=dry_run)
        processes.take_device(job.run.model.device)
        if not dry_run:
            check_can_shard(job.run, processes.count)
        return job

    return processes.in_all(resolve_here)


def _resolve(
    taken: BoundInputs,
    command_line: CommandLine,
    listener: Listener,
    callbacks: Sequence[TrainerCallback],
    processes: Processes,
    *,
    try_method: bool,
) -> _Job:
    """Resolve and show the plan; raise for every problem that can be detected without weights."""
    config = taken.config
    output, recipe = config.output, command_line.recipe
    check_output(output.dir, overwrite=output.overwrite, resume=output.resume)
    check_packages(config.model, config.speed, output)
    if output.push_to_hub is not None:
        named = {"push_to_hub": find_repository(output.push_to_hub)}
        config = config.model_copy(update={"output": output.model_copy(update=named)})
    origin = describe_recipe(recipe) if recipe else None
    check_base_stays(config.model, output, config.data.chat_template)
    listener.stage("read the data and the model's shape")
    config, adapter, notes = resolve_adapter(config)
    config, why = infer_task(config)
    run = resolve(
        config,
        progress=listener.progress,
        why_task=why,
        adapter=adapter,
        prompt_version=stored_prompt_version(output),
    )
    run = replace(run, choices=[*taken.choices, *run.choices])
    check_base_outlives(run)
    run = replace(run, beside=find_auxiliary_models(run))
    sized = size_choices(run, try_method=try_method)
    foresight = estimate_memory(run, processes.count)
    listener.choices("train", [foresight.choice(), *run.choices, *sized])
    notes += find_adapter_warnings(adapter, run) if adapter else []
    data = run.data
    sizes, new_head = (len(data.train), len(data.validation)), bool(run.model.new_heads)
    warnings = find_warnings(config.train, *sizes, new_head=new_head)
    for warning in [*notes, *find_default_model_warnings(config.model, config.data), *warnings]:
        listener.warn(warning)
    return _Job(taken, run, listener, callbacks, origin, processes, command_line.start, foresight)


def _choose_micro_batch(job: _Job) -> _Job:
    """Set the micro-batch size from the available memory, if requested, and show it."""
    run = job.run
    if run.config.speed.tokens_per_micro_batch != "memory":
        return job
    tokens = stored_micro_batch_tokens(run.config.output)
    chosen = choose_micro_batch(run, job.processes, tokens)
    job.listener.choices("train", chosen.choices[len(run.choices) :])
    return replace(job, run=chosen)


def _train(job: _Job, held: contextlib.ExitStack) -> TrainResult:
    job = _choose_micro_batch(job)
    run, listener, processes = job.run, job.listener, job.processes
    origin = origin_of(run, describe_taken(run, job.taken))
    processes.check_same(everything_of(run, origin))
    going_on = processes.from_first(lambda: resolve_resume(run, origin, listener))
    if (summary := going_on.finished) is not None and run.config.output.dir is not None:
        return _end_finished(job, RunDirectory(run.config.output.dir), summary)
    before = resident_bytes()
    run, adapted, asked = precompute_and_load(run, listener)
    processes.from_first(
        lambda: check_disk_space(
            run.config.output.dir, run.config.train, adapted.model, run.schedule.steps
        )
    )
    verified = verify_step(run, adapted, listener)
    release_freed_memory()
    directory = processes.from_first(
        lambda: open_or_resume(job.taken, run, origin, going_on, listener)
    )
    check_shared(directory, processes)
    run, base = store_base(run, job.taken, directory, is_first=processes.is_first)
    digests = _claim_directory(run, directory, held) if processes.is_first else ()
    held.enter_context(explain_interrupt(directory))
    shards = run.config.train.shard != "none"
    untrained = probe_untrained(adapted, run) if shards else None
    trainer = build_trainer(run, adapted, directory, going_on, processes)
    checkpoint = going_on.checkpoint
    watch = add_callbacks(
        trainer,
        run,
        directory,
        listener,
        processes,
        checkpoint,
        None
        if adapted.start
        else partial(write_tokenizer_and_card, run=run, base=base, start=asked.start),
    )
    restore_progress(trainer, watch, directory, going_on, processes)
    signs = held.enter_context(WatchProcesses(processes, listener.warn))
    for callback in (WaitForBytes(each.wait for each in digests), signs, *job.callbacks):
        trainer.add_callback(callback)
    if processes.is_first:
        told = describe_run(run.config.output, resolved_config(run), directory, going_on.past)
        watch.report.writers += held.enter_context(
            tracking(run.config.output.report_to, told, listener)
        )

    listener.stage("train")
    with watch.interrupt, explain_disk_errors(directory), matmul_context(run):
        if checkpoint is None and not run.data.stream:
            trainer.smaller.try_longest(run.data.train, run.model.dtype)
        if checkpoint is None and isinstance(trainer, RlTrainer):
            check_before(trainer, run.data.train, listener)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if watch.interrupt.has_stopped:
        raise Interrupted(describe_stop(directory, trainer.state), watch.interrupt.exit_code)
    kept = keep_best(trainer, watch.best)
    elsewhere = TrainResult({}, directory.path, adapted.model, run.model.tokenizer)
    if not processes.is_first and not shards:
        return elsewhere
    trained_at = time.perf_counter()
    with matmul_context(run):
        records = watch.report.records
        records = processes.from_first(lambda: records) if shards else records
        run = end_training(trainer, run, records)
    release_freed_memory()

    listener.stage("save and check")
    start, gradients = asked.start, watch.gradients

    def write(weights: Mapping[str, Any] | None = None) -> None:
        save(adapted, run, directory, base, start, weights)

    with explain_disk_errors(directory):
        if shards:
            save_sharded(adapted, run.config.method, processes, write)
            proof = prove_sharded(adapted, run, directory, gradients, processes, untrained)
        else:
            write()
            proof = prove(adapted, run, directory, gradients)
    if not processes.is_first:
        return elsewhere
    outcome = Outcome(
        run=directory.path,
        recipe=job.recipe,
        base=base,
        model=adapted.model,
        records=watch.report.records,
        proof=proof,
        timings=measure_times(watch.report, job.start, trained_at, int(trainer.tokens_seen)),
        evaluator=trainer.evaluator,
        answers=watch.answers,
        speed=describe_speed(trainer, asdict(verified) if verified else None),
        kept=kept,
        changes=directory.read_changes(),
        left_out=select_skipped_steps(directory.read_notes()),
        plan=job.memory_estimate.compare(before),
    )
    about, notes = asked.describe(run, outcome.records)
    for note in notes:
        listener.warn(note)
    summary = report_results(run, outcome, directory, listener, about)
    return TrainResult(summary, directory.path, adapted.model, run.model.tokenizer)


def _end_finished(job: _Job, directory: RunDirectory, summary: Mapping[str, Any]) -> TrainResult:
    """Return the result of a run that was resumed but had already finished."""
    if job.processes.is_first:
        mark_end_once(directory.path)
    job.listener.end(
        {**summary, "nothing_left": describe_end(directory, job.run.config.train, summary)}
    )
    return TrainResult(summary, directory.path, None, job.run.model.tokenizer)


def _claim_directory(
    run: Run, directory: RunDirectory, held: contextlib.ExitStack
) -> Sequence[FileDigests]:
    """Claim the run's directory until `held` closes, and compute missing digests of its inputs."""
    held.enter_context(lock_directory(directory.path))
    held.enter_context(replace_run(directory.path))
    digests = digests_of(run)
    for each in digests:
        each.keep(directory.checkpoints)
        held.callback(each.wait)
    return digests
