"""Resolve a training job, load and adapt its model, train, save, and verify what was saved."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ftlevel.artifacts.files import Workspace
from ftlevel.artifacts.hub import get_repo_id
from ftlevel.artifacts.run_directory import (
    RunDirectory,
    check_output,
    get_recipe_info,
    lock_dir,
    record_files_once,
    replace_run,
)
from ftlevel.config import DataConfig, InMemoryDataset, QuantConfig, TrainConfig
from ftlevel.config.section import Choice
from ftlevel.config.sections import wrap_rows
from ftlevel.errors import ConfigError, Interrupted
from ftlevel.evaluation.server import check_server
from ftlevel.events import Listener
from ftlevel.models.hardware import resident_bytes, trim_heap
from ftlevel.models.in_memory import place_model
from ftlevel.training.best import SelectedModel
from ftlevel.training.build_trainer import (
    RunCallbacks,
    add_callbacks,
    build_trainer,
    matmul_context,
    restore_progress,
)
from ftlevel.training.callbacks import describe_run, tracking
from ftlevel.training.finish import (
    StartTime,
    end_training,
    measure_times,
    report_results,
    save,
    write_tokenizer_and_card,
)
from ftlevel.training.forecast.alternatives import choose_micro_batch
from ftlevel.training.forecast.fits import MemoryEstimate, estimate_memory
from ftlevel.training.gradients import select_skipped_steps
from ftlevel.training.model import PreparedModel, describe_speed, load_adapted
from ftlevel.training.origin import FileDigests, digests_of
from ftlevel.training.plan.adapter import find_adapter_warnings, resolve_adapter
from ftlevel.training.plan.resolve import check_packages, infer_task, resolve
from ftlevel.training.plan.run import Run, size_choices
from ftlevel.training.plan.schedule import find_default_model_warnings, get_warnings
from ftlevel.training.processes import (
    Processes,
    WatchProcesses,
    resolve_processes,
    started_processes,
)
from ftlevel.training.proof import Proof, prove
from ftlevel.training.reference import compute_initial_reference, precompute_reference
from ftlevel.training.resume import (
    ResumeState,
    check_base_not_overwritten,
    check_same_base,
    check_shared,
    describe_end,
    describe_stop,
    explain_interrupt,
    open_or_resume,
    store_base,
    stored_micro_batch_tokens,
    stored_prompt_version,
)
from ftlevel.training.rl.checks import check_before
from ftlevel.training.saving import WaitForBytes, check_disk_space, explain_disk_errors
from ftlevel.training.sharding import check_can_shard, probe_untrained, prove_sharded, save_sharded
from ftlevel.training.step_comparison import StepComparison
from ftlevel.training.summary import Outcome, resolved_config
from ftlevel.training.teacher import (
    AuxiliaryOutputs,
    build_scorer,
    find_auxiliary_models,
    precompute_teacher,
)
from ftlevel.training.text_models import with_text_models
from ftlevel.training.trainer import FtlevelTrainer
from ftlevel.training.verify import verify_step

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class TrainInputs:
    """Python objects passed to `train`; `callbacks` are called after ftlevel's own."""

    dataset: Any = None
    eval_dataset: Any = None
    model: Any = None
    tokenizer: Any = None
    callbacks: Sequence[TrainerCallback] = ()


@dataclass(frozen=True)
class BoundInputs:
    """Configuration with a name or path for every passed object, and lines for the screen.

    `written_base` is the directory to which a passed model was written; None if it was not.
    """

    config: TrainConfig
    callbacks: Sequence[TrainerCallback] = ()
    written_base: Path | None = None
    choices: tuple[Choice, ...] = ()


def bind_inputs(config: TrainConfig, inputs: TrainInputs, stack: ExitStack) -> BoundInputs:
    """Bind `inputs` to `config`; a passed model is written to a directory until `stack` closes.

    Raises ConfigError if an object has the wrong type, or is also set in the configuration.
    """
    _check_callbacks(inputs.callbacks)
    rows = {"dataset": inputs.dataset, "validation_file": inputs.eval_dataset}
    names = {
        key: _name(key, value, config.data) for key, value in rows.items() if value is not None
    }
    if names:
        config = config.with_sections(data=config.data.model_copy(update=names))
    if inputs.model is None and inputs.tokenizer is None:
        return BoundInputs(config, inputs.callbacks)
    folder = stack.enter_context(Workspace("model"))
    placed = place_model(inputs.model, inputs.tokenizer, config.model, Path(folder))
    sections: dict[str, Any] = {
        "model": config.model.model_copy(update={"name_or_path": placed.name})
    }
    if placed.quant is not None:
        sections["quant"] = _own_quant(config.quant, placed.quant)
    config = config.with_sections(**sections)
    return BoundInputs(config, inputs.callbacks, placed.directory, (placed.choice,))


def _own_quant(requested: QuantConfig, quant: QuantConfig) -> QuantConfig:
    """Returns `quant`, of a passed model; ConfigError if the `requested` one contradicts it."""
    if requested.kind not in ("none", quant.kind) or (
        requested.kind == quant.kind and requested != quant
    ):
        raise ConfigError(
            f"quant is {requested.form}, and model= is quantized already: {quant.form}. Drop "
            f"quant, or "
            "give the model in floating point."
        )
    return quant


def _name(key: str, value: Any, data: DataConfig) -> str:
    field = "dataset" if key == "dataset" else "eval_dataset"
    if key in data.model_fields_set and getattr(data, key) is not None:
        raise ConfigError(
            f"{field}= is given, and the configuration has data.{key} too. Use one of them."
        )
    name = wrap_rows(value)
    if not isinstance(name, str):
        raise ConfigError(
            f"{field}= is of type {type(value).__name__}. Expected a DataFrame, a "
            "datasets.Dataset or DatasetDict, a list of dicts, or a file's name."
        )
    if isinstance(name, InMemoryDataset):
        name.said = field
    return name


def _check_callbacks(callbacks: Sequence[TrainerCallback]) -> None:
    from transformers import TrainerCallback

    for callback in callbacks:
        if not isinstance(callback, TrainerCallback):
            name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            raise ConfigError(
                f"callbacks= has {name}. Expected instances of transformers.TrainerCallback, such "
                f"as {name}()."
                if isinstance(callback, type)
                else f"callbacks= has one of type {name}. Expected instances of "
                "transformers.TrainerCallback."
            )


@dataclass(frozen=True)
class CommandLine:
    """The recipe's path and the start time of the process, for a run from the command line."""

    recipe: Path | None
    start: StartTime


@dataclass(frozen=True)
class TrainingJob:
    """A run before the weights load, and everything else that training needs.

    Attributes:
        processes: all processes of the run.
        memory: the estimate printed at the start.
        callbacks: the caller's callbacks, called after ftlevel's own.
        recipe: path and git state of the recipe; None without one.
    """

    run: Run
    processes: Processes
    memory: MemoryEstimate
    listener: Listener
    callbacks: Sequence[TrainerCallback]
    recipe: Mapping[str, Any] | None
    start: StartTime


def resolve_job(
    inputs: BoundInputs, command: CommandLine, listener: Listener, *, dry_run: bool
) -> TrainingJob:
    """Resolve and show a run in every process; an error in one is raised in all.

    Raises ConfigError for every problem that can be detected without weights.
    """
    processes = started_processes()
    train = resolve_processes(inputs.config.train, processes, rows_only=dry_run)
    inputs = replace(inputs, config=inputs.config.model_copy(update={"train": train}))
    if dry_run:  # one process is enough
        processes = Processes()
    processes.join()

    def resolve_here() -> tuple[Run, MemoryEstimate]:
        run, memory = _resolve(inputs, listener, processes.count, try_method=dry_run)
        processes.take_device(run.model.device)
        if not dry_run:
            check_can_shard(run, processes.count)
        return run, memory

    run, memory = processes.in_all(resolve_here)
    if run.config.speed.tokens_per_micro_batch == "memory":
        tokens = stored_micro_batch_tokens(run.config.output)
        sized = choose_micro_batch(run, processes, tokens)
        listener.choices("train", sized.choices[len(run.choices) :])
        run = sized
    recipe = get_recipe_info(command.recipe) if command.recipe else None
    return TrainingJob(run, processes, memory, listener, inputs.callbacks, recipe, command.start)


def _resolve(
    inputs: BoundInputs, listener: Listener, processes: int, *, try_method: bool
) -> tuple[Run, MemoryEstimate]:
    """Resolve the configuration, check it, and show its resolved settings and all warnings."""
    config, output = inputs.config, inputs.config.output
    check_output(output.dir, overwrite=output.overwrite, resume=output.resume)
    check_packages(config.model, config.speed, output)
    if output.push_to_hub is not None:
        repository = {"push_to_hub": get_repo_id(output.push_to_hub)}
        config = config.model_copy(update={"output": output.model_copy(update=repository)})
    check_same_base(config.model, output, config.data.chat_template, config.task)
    listener.stage("reading data and model configuration")
    config, adapter, notes = resolve_adapter(config)
    config, task_reason = infer_task(config)
    run = resolve(
        config,
        progress=listener.progress,
        why_task=task_reason,
        adapter=adapter,
        prompt_version=stored_prompt_version(output),
    )
    choices = [*inputs.choices, *run.choices]
    run = replace(run, choices=choices, written_base=inputs.written_base)
    check_base_not_overwritten(run)
    run = replace(run, auxiliary=find_auxiliary_models(run))
    check_server(config.rl)
    sizes = size_choices(run, try_method=try_method)
    memory = estimate_memory(run, processes)
    listener.choices("train", [memory.choice(), *run.choices, *sizes])
    notes += find_adapter_warnings(adapter, run) if adapter else []
    rows = len(run.data.train), len(run.data.validation)
    for warning in [
        *notes,
        *find_default_model_warnings(config.model, config.data),
        *get_warnings(config.train, *rows, new_head=bool(run.model.new_heads)),
    ]:
        listener.warn(warning)
    return run, memory


@dataclass
class TrainingSession:
    """A job with its loaded model, Trainer and run directory.

    Attributes:
        run: the job's run, with the outputs of auxiliary models in the rows.
        base: what card and summary record about the base model, from `base_facts`.
        comparison: result of verifying the fast step; None if it was not verified.
        initial_logits: logits before training; None unless `--method full` is sharded.
        resident: bytes of the process before the model was loaded.
        selected: the selected model; None before training, or if none is selected.
        trained_at: time at which training ended.
    """

    job: TrainingJob
    run: Run
    adapted: PreparedModel
    auxiliary: AuxiliaryOutputs
    directory: RunDirectory
    base: Mapping[str, Any]
    resumed: ResumeState
    trainer: FtlevelTrainer
    callbacks: RunCallbacks
    comparison: StepComparison | None
    initial_logits: Tensor | None
    resident: int
    selected: SelectedModel | None = None
    trained_at: float = 0.0

    @property
    def is_sharded(self) -> bool:
        """Whether the model is sharded: all processes then evaluate, save and verify together."""
        return self.run.config.train.shard != "none"

    def train(self) -> None:
        """Train, and load the best model if configured; raise Interrupted after a signal."""
        run, trainer, checkpoint = self.run, self.trainer, self.resumed.checkpoint
        self.job.listener.stage("training")
        with self.callbacks.interrupt, explain_disk_errors(self.directory), matmul_context(run):
            if checkpoint is None and not run.data.stream:
                trainer.smaller.try_longest(run.data.train, run.model.dtype)
            if checkpoint is None:
                check_before(trainer, run.data.train, self.job.listener)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        interrupt = self.callbacks.interrupt
        if interrupt.has_stopped:
            raise Interrupted(describe_stop(self.directory, trainer.state), interrupt.exit_code)
        best, state = self.callbacks.best, trainer.state
        if best is not None:
            self.selected = best.finish(trainer.model, state.global_step, state.max_steps)
        self.trained_at = time.perf_counter()

    def evaluate(self) -> None:
        """Evaluate the final model, unless it was already evaluated after the last step."""
        with matmul_context(self.run):
            records: Sequence[Mapping[str, Any]] = self.callbacks.report.records
            if self.is_sharded:
                records = self.job.processes.from_first(lambda: records)
            self.run = end_training(self.trainer, self.run, records)
        trim_heap()

    def save(self) -> None:
        """Write the adapter or the full model with the tokenizer and card."""
        self.job.listener.stage("saving and verifying")

        def write(weights: Mapping[str, Any] | None = None) -> None:
            start = self.auxiliary.start
            save(self.adapted, self.run, self.directory, self.base, start, weights)

        with explain_disk_errors(self.directory):
            if self.is_sharded:
                save_sharded(self.adapted, self.run.config.method, self.job.processes, write)
            else:
                write()

    def verify(self) -> Proof:
        """Compare the saved files with the trained model; raise RunError if they differ."""
        model, run, directory = self.adapted, self.run, self.directory
        gradients, processes = self.callbacks.gradients, self.job.processes
        with explain_disk_errors(directory):
            if self.is_sharded:
                logits = self.initial_logits
                return prove_sharded(model, run, directory, gradients, processes, logits)
            return prove(model, run, directory, gradients)

    def report(self, proof: Proof) -> Mapping[str, Any]:
        """Write and show the results of the run; returns its summary."""
        job, callbacks, trainer = self.job, self.callbacks, self.trainer
        tokens, records = int(trainer.tokens_seen), callbacks.report.records
        comparison = asdict(self.comparison) if self.comparison else None
        outcome = Outcome(
            run=self.directory.path,
            recipe=job.recipe,
            base=self.base,
            model=self.adapted.model,
            records=records,
            proof=proof,
            timings=measure_times(callbacks.report, job.start, self.trained_at, tokens),
            evaluator=trainer.evaluator,
            answers=callbacks.answers,
            speed=describe_speed(trainer, comparison),
            selected=self.selected,
            changes=self.directory.load_changes(),
            skipped_steps=select_skipped_steps(self.directory.load_events()),
            plan=job.memory.compare(self.resident),
        )
        facts, notes = self.auxiliary.describe(self.run, records)
        for note in notes:
            job.listener.warn(note)
        return report_results(self.run, outcome, self.directory, job.listener, facts)


def open_session(job: TrainingJob, resumed: ResumeState, stack: ExitStack) -> TrainingSession:
    """Load and adapt the model of `job`; its run directory stays locked until `stack` closes."""
    run, listener, processes = job.run, job.listener, job.processes
    resident = resident_bytes()
    run, reference = precompute_reference(with_text_models(run, listener), listener)
    teacher = precompute_teacher(run, listener)
    listener.stage("loading the model")  # the auxiliary models are freed
    adapted = load_adapted(run, listener)
    if reference is None:
        run, reference = compute_initial_reference(run, adapted, listener)
    if teacher is not None:
        run = replace(run, data=replace(run.data, train=teacher.rows))
    auxiliary = AuxiliaryOutputs(reference, teacher, build_scorer(run, listener))
    config, steps = run.config, run.schedule.steps
    processes.from_first(
        lambda: check_disk_space(config.output.dir, config.train, adapted.model, steps)
    )
    comparison = verify_step(run, adapted, listener)
    trim_heap()
    directory = processes.from_first(lambda: open_or_resume(run, resumed, listener))
    check_shared(directory, processes)
    run, base = store_base(run, directory, is_first=processes.is_first)
    digests = _claim_directory(run, directory, stack) if processes.is_first else ()
    stack.enter_context(explain_interrupt(directory))
    is_sharded = config.train.shard != "none"
    initial_logits = probe_untrained(adapted, run) if is_sharded else None
    trainer = build_trainer(run, adapted, directory, resumed, processes, auxiliary.scorer)
    write_files = partial(write_tokenizer_and_card, run=run, base=base, start=auxiliary.start)
    callbacks = add_callbacks(
        trainer,
        run,
        directory,
        listener,
        processes,
        resumed.checkpoint,
        None if adapted.start else write_files,
    )
    restore_progress(trainer, callbacks, directory, resumed, processes)
    watch = stack.enter_context(WatchProcesses(processes, listener.warn))
    for callback in (WaitForBytes(each.wait for each in digests), watch, *job.callbacks):
        trainer.add_callback(callback)
    if processes.is_first:
        tracked = describe_run(config.output, resolved_config(run), directory, resumed.past)
        writers = tracking(config.output.report_to, tracked, listener)
        callbacks.report.writers += stack.enter_context(writers)
    return TrainingSession(
        job=job,
        run=run,
        adapted=adapted,
        auxiliary=auxiliary,
        directory=directory,
        base=base,
        resumed=resumed,
        trainer=trainer,
        callbacks=callbacks,
        comparison=comparison,
        initial_logits=initial_logits,
        resident=resident,
    )


def _claim_directory(run: Run, directory: RunDirectory, stack: ExitStack) -> Sequence[FileDigests]:
    """Lock the run's directory until `stack` closes, and start to hash the run's input files."""
    stack.enter_context(lock_dir(directory.path))
    stack.enter_context(replace_run(directory.path))
    digests = digests_of(run)
    for each in digests:
        each.keep(directory.checkpoints)
        stack.callback(each.wait)
    return digests


def end_finished(job: TrainingJob, directory: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Report that a run to be resumed has already finished."""
    if job.processes.is_first:
        record_files_once(directory.path)
    message = describe_end(directory, job.run.config.train, summary)
    job.listener.end({**summary, "nothing_left": message})
