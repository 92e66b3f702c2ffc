"""Resolve a training job, load and adapt its model, train, save, and verify what was saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ftlevel.artifacts.checkpoints import step_of
from ftlevel.artifacts.files import Workspace, lock_dir
from ftlevel.artifacts.hub import get_repo_id
from ftlevel.artifacts.run_directory import (
    RunDirectory,
    check_output,
    get_recipe_info,
    record_files_once,
    replace_run,
)
from ftlevel.config import DataConfig, InMemoryDataset, QuantConfig, TrainConfig
from ftlevel.config.section import Choice
from ftlevel.config.sections import wrap_rows
from ftlevel.errors import ConfigError, Interrupted
from ftlevel.events import Listener
from ftlevel.fast.plan import plan_plain
from ftlevel.models.hardware import free_device_memory, resident_bytes, trim_heap
from ftlevel.models.in_memory import place_model
from ftlevel.training.best import SelectedModel
from ftlevel.training.build_trainer import (
    RunCallbacks,
    add_callbacks,
    create_trainer,
    matmul_context,
    restore_progress,
)
from ftlevel.training.callbacks import get_run_info, tracking
from ftlevel.training.finish import (
    StartTime,
    end_training,
    measure_times,
    report_results,
    save,
    save_tokenizer_and_card,
)
from ftlevel.training.forecast.alternatives import is_sized_by_memory, select_batch_size
from ftlevel.training.forecast.fits import MemoryEstimate, estimate_memory, select_checkpointing
from ftlevel.training.model import PreparedModel, get_speed_info
from ftlevel.training.origin import FileDigests, get_file_digests
from ftlevel.training.plan.adapter import get_adapter_warnings, resolve_adapter
from ftlevel.training.plan.resolve import check_packages, infer_task, resolve
from ftlevel.training.plan.run import Run, size_choices
from ftlevel.training.plan.schedule import get_default_model_warnings, get_schedule_warnings
from ftlevel.training.processes import (
    Processes,
    WatchProcesses,
    resolve_processes,
    started_processes,
)
from ftlevel.training.proof import Proof, verify_run
from ftlevel.training.reference import compute_initial_reference, precompute_reference
from ftlevel.training.resume import (
    PLAIN_STEP,
    ResumeState,
    check_base_not_overwritten,
    check_same_base,
    check_shared,
    convert_interrupt,
    get_finished_message,
    get_interrupt_message,
    load_previous_batch_tokens,
    open_or_resume,
    store_base,
)
from ftlevel.training.saving import (
    WaitForHashes,
    WriteManifest,
    check_disk_space,
    explain_disk_errors,
)
from ftlevel.training.sharding import (
    check_can_shard,
    compute_initial_logits,
    save_sharded,
    verify_sharded_run,
)
from ftlevel.training.step_comparison import FastStepError, StepComparison
from ftlevel.training.summary import Outcome, resolved_config
from ftlevel.training.teacher import (
    AuxiliaryOutputs,
    precompute_teacher,
    resolve_auxiliary_models,
)
from ftlevel.training.text_models import with_text_models
from ftlevel.training.trainer import FtlevelTrainer
from ftlevel.training.verify import check_fast_step

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class TrainInputs:
    """Python objects passed to `train`, else None; `callbacks` are called after ftlevel's own."""

    dataset: Any = None
    eval_dataset: Any = None
    model: Any = None
    tokenizer: Any = None
    callbacks: Sequence[TrainerCallback] = ()


@dataclass(frozen=True)
class BoundInputs:
    """Result of `bind_inputs`: the configuration refers to all passed objects by name.

    `written_base` is the directory to which a passed model was written; None if it was not.
    `choices` are lines to print.
    """

    config: TrainConfig
    callbacks: Sequence[TrainerCallback]
    written_base: Path | None = None
    choices: tuple[Choice, ...] = ()


def bind_inputs(config: TrainConfig, inputs: TrainInputs, stack: ExitStack) -> BoundInputs:
    """Refer to objects of `inputs` by name in `config`; a model is on disk until `stack` closes."""
    _check_callbacks(inputs.callbacks)
    rows = {"dataset": inputs.dataset, "validation_file": inputs.eval_dataset}
    names = {
        key: _name(key, value, config.data) for key, value in rows.items() if value is not None
    }
    if names:
        config = config.with_sections(data=config.data.model_copy(update=names))
    if inputs.model is None and inputs.tokenizer is None:
        return BoundInputs(config, inputs.callbacks)
    workspace = stack.enter_context(Workspace("model"))
    saved_model = place_model(inputs.model, inputs.tokenizer, config.model, Path(workspace))
    updates: dict[str, Any] = {
        "model": config.model.model_copy(update={"name_or_path": saved_model.name})
    }
    if saved_model.quant is not None:
        updates["quant"] = _resolve_quant(config.quant, saved_model.quant)
    config = config.with_sections(**updates)
    return BoundInputs(config, inputs.callbacks, saved_model.directory, (saved_model.choice,))


def _resolve_quant(requested: QuantConfig, quant: QuantConfig) -> QuantConfig:
    if requested.kind not in ("none", quant.kind) or (
        requested.kind == quant.kind and requested != quant
    ):
        raise ConfigError(
            f"quant is {requested.form}, and model= is quantized already: {quant.form}. Drop "
            "quant, or give the model in floating point."
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
        name.label = field
    return name


def _check_callbacks(callbacks: Sequence[TrainerCallback]) -> None:
    from transformers import EarlyStoppingCallback, TrainerCallback

    for callback in callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            patience = callback.early_stopping_patience
            raise ConfigError(
                "callbacks= has EarlyStoppingCallback, which needs checkpoints of transformers. "
                f"Use TrainConfig(train={{'early_stopping_patience': {patience}}})."
            )
        if not isinstance(callback, TrainerCallback):
            is_class = isinstance(callback, type)
            name = callback.__name__ if is_class else f"one of type {type(callback).__name__}"
            raise ConfigError(
                f"callbacks= has {name}. Expected instances of transformers.TrainerCallback"
                f"{f', such as {name}()' if is_class else ''}."
            )


@dataclass(frozen=True)
class CommandLine:
    """Start time of a run, and the recipe file named on its command line (None without one)."""

    recipe: Path | None
    start: StartTime


@dataclass(frozen=True)
class TrainingJob:
    """A run before the weights load, and everything else that training needs.

    Attributes:
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
    """Resolve and show the run of `inputs`; an error in one process is raised in all."""
    processes = started_processes()
    train = resolve_processes(inputs.config.train, processes, is_dry_run=dry_run)
    inputs = replace(inputs, config=inputs.config.model_copy(update={"train": train}))
    if dry_run:  # one process is enough
        processes = Processes()
    processes.join()

    def resolve_locally() -> tuple[Run, MemoryEstimate]:
        run, memory = _resolve(inputs, listener, processes.count, try_method=dry_run)
        processes.select_device(run.model.device)
        check_can_shard(run, None if dry_run else processes.count)
        return run, memory

    run, memory = processes.in_all(resolve_locally)
    if transports := processes.disable_unsupported_transports(run.model.device):
        listener.choices("train", transports)
    if is_sized_by_memory(run):
        sized = select_batch_size(run, processes, load_previous_batch_tokens(run.config.output))
        listener.choices("train", sized.choices[len(run.choices) :])
        run = sized
    run = _with_checkpointing(run, processes, listener)
    recipe = get_recipe_info(command.recipe) if command.recipe else None
    return TrainingJob(run, processes, memory, listener, inputs.callbacks, recipe, command.start)


def _with_checkpointing(run: Run, processes: Processes, listener: Listener) -> Run:
    recomputes, choices = processes.from_first(lambda: select_checkpointing(run, processes.count))
    listener.choices("train", choices)
    return replace(run, recomputes=recomputes, choices=[*run.choices, *choices])


def _resolve(
    inputs: BoundInputs, listener: Listener, processes: int, *, try_method: bool
) -> tuple[Run, MemoryEstimate]:
    config, output = inputs.config, inputs.config.output
    check_output(output.dir, overwrite=output.overwrite, resume=output.resume)
    check_packages(config.model, output)
    if output.push_to_hub is not None:
        hub_output = {"push_to_hub": get_repo_id(output.push_to_hub)}
        config = config.model_copy(update={"output": output.model_copy(update=hub_output)})
    check_same_base(config.model, output, config.data.chat_template, config.task)
    listener.stage("reading data and model configuration")
    config, adapter, notes = resolve_adapter(config)
    config, task_reason = infer_task(config)
    run = resolve(
        config,
        progress=listener.progress,
        why_task=task_reason,
        adapter=adapter,
    )
    run = replace(run, choices=[*inputs.choices, *run.choices], written_base=inputs.written_base)
    check_base_not_overwritten(run)
    run = replace(run, auxiliary=resolve_auxiliary_models(run))
    run.hooks.check_run(run)
    sizes = size_choices(run, build_modules=try_method)
    memory = estimate_memory(run, processes)
    listener.choices("train", [memory.choice(), *run.choices, *sizes])
    notes += get_adapter_warnings(adapter, run) if adapter else []
    for warning in [
        *notes,
        *get_default_model_warnings(config.model, config.data),
        *get_schedule_warnings(
            config.train,
            run.schedule.steps,
            len(run.data.validation),
            new_head=bool(run.model.new_heads),
        ),
        *config.list_unused(run.model.kind),
    ]:
        listener.warn(warning)
    return run, memory


@dataclass
class TrainingSession:
    """A job with its loaded model, Trainer and run directory.

    Attributes:
        run: the job's run, with the outputs of auxiliary models in the rows.
        base: name, kind and fingerprint of the base model, for card and summary.
        comparison: result of verifying the fast step; None if it was not verified.
        initial_logits: logits before training; None unless `--method full` is sharded.
        initial_memory: bytes of the process before the model was loaded.
        selected: the selected model; None before training, or if none is selected.
        trained_at: end of training, by `time.perf_counter`.
    """

    job: TrainingJob
    run: Run
    model: PreparedModel
    auxiliary: AuxiliaryOutputs
    output_dir: RunDirectory
    base: Mapping[str, Any]
    resumed: ResumeState
    trainer: FtlevelTrainer
    callbacks: RunCallbacks
    comparison: StepComparison | None
    initial_logits: Tensor | None
    initial_memory: int
    selected: SelectedModel | None = None
    trained_at: float = 0.0

    @property
    def is_sharded(self) -> bool:
        """Whether the model is sharded: all processes then save and verify together."""
        return self.run.config.train.shard != "none"

    def train(self) -> None:
        """Train, and load the best model if configured; raise Interrupted after a signal."""
        try:
            self._train()
        except BaseException:  # threads and replaced functions would outlive the run
            if self.trainer.fast is not None:
                self.trainer.fast.remove()
            raise
        best, state = self.callbacks.best, self.trainer.state
        if best is not None:
            self.selected = best.finish(self.trainer.model, state.global_step, state.max_steps)
        self.trainer.gather_failures()
        self.trained_at = time.perf_counter()

    def _train(self) -> None:
        run, trainer, checkpoint = self.run, self.trainer, self.resumed.checkpoint
        self.job.listener.stage("training")
        with self.callbacks.interrupt, explain_disk_errors(self.output_dir), matmul_context(run):
            if checkpoint is None:
                trainer.smaller.check_memory(run.data.train, run.model.dtype)
                run.hooks.check_trainer(trainer, run.data.train, self.job.listener)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        interrupt = self.callbacks.interrupt
        if interrupt.has_stopped:
            raise Interrupted(
                get_interrupt_message(self.output_dir, trainer.state), interrupt.exit_code
            )

    def evaluate(self) -> None:
        """Evaluate the final model, unless it was already evaluated after the last step."""
        with matmul_context(self.run):
            records = self.job.processes.from_first(lambda: self.callbacks.report.records)
            end_training(self.trainer, records)
            if not self.is_sharded:
                step = self.selected.step if self.selected else self.trainer.state.global_step
                self.callbacks.answers.complete(self.trainer.evaluator, self.trainer.model, step)
        trim_heap()

    def save(self) -> None:
        """Write the adapter or the full model with the tokenizer and card."""
        self.job.listener.stage("saving and verifying")

        def write(weights: Mapping[str, Any] | None = None) -> None:
            save(self.model, self.run, self.output_dir, self.base, self.auxiliary.files, weights)

        with explain_disk_errors(self.output_dir):
            if self.is_sharded:
                save_sharded(self.model, self.run, self.job.processes, write)
            else:
                write()

    def verify(self) -> Proof:
        """Compare the saved files with the trained model; raise RunError if they differ."""
        model, run, output_dir = self.model, self.run, self.output_dir
        gradients, processes = self.callbacks.gradients, self.job.processes
        with explain_disk_errors(output_dir):
            if self.is_sharded:
                logits = self.initial_logits
                return verify_sharded_run(model, run, output_dir, gradients, processes, logits)
            why_no_effect = run.hooks.explain_no_effect(run, self.callbacks.report.records)
            return verify_run(model, run, output_dir, gradients, why_no_effect)

    def report(self, proof: Proof) -> Mapping[str, Any]:
        """Write and show the results of the run; returns the contents of summary.json."""
        job, callbacks, trainer = self.job, self.callbacks, self.trainer
        tokens, records = callbacks.report.tokens or 0, callbacks.report.records
        outcome = Outcome(
            run=self.output_dir.path,
            recipe=job.recipe,
            base=self.base,
            model=self.model.model,
            records=records,
            proof=proof,
            steps=trainer.state.global_step,
            timings=measure_times(callbacks.report, job.start, self.trained_at, tokens),
            evaluator=trainer.evaluator,
            answers=callbacks.answers,
            speed=get_speed_info(trainer, self.run.fast.failure, self.comparison),
            selected=self.selected,
            changes=self.output_dir.load_changes(),
            skipped_steps=[note for note in self.output_dir.load_events() if "how" in note],
            plan=job.memory.compare(self.initial_memory),
        )
        facts, notes = self.auxiliary.describe(self.run, records)
        for note in notes:
            job.listener.warn(note)
        return report_results(self.run, outcome, self.output_dir, job.listener, facts)


@dataclass(frozen=True)
class PreparedRun:
    """A run with its loaded model, and the outputs of auxiliary models in its rows.

    Attributes:
        comparison: result of verifying the fast step; None if it was not verified.
        initial_memory: bytes of the process before any model was loaded.
    """

    run: Run
    model: PreparedModel
    auxiliary: AuxiliaryOutputs
    comparison: StepComparison | None
    initial_memory: int


LoadModel = Callable[[Run, Listener], PreparedModel]


def prepare_run(job: TrainingJob, resumed: ResumeState, load: LoadModel) -> PreparedRun:
    """Compute the outputs of auxiliary models, `load` the model, and verify its fast step.

    If the fast step is not the plain one, or was not when the run to resume started, all is done
    again for the plain step; with `--verify-fast`, FastStepError is raised instead.
    """
    initial_memory, failure, when = resident_bytes(), resumed.failure, " when the run started"
    if not failure:
        try:
            return _prepare(job, job.run, load, initial_memory)
        except FastStepError as error:
            if job.run.config.speed.verify:
                raise
            failure, when = error.problem, ""
        free_device_memory()
    report = "" if when else " Please report this with the command."
    job.listener.warn(f"fast step disabled{when}: {failure}; training with the plain step.{report}")
    plan = replace(plan_plain(job.run.objective, job.run.fast.tokens), failure=failure)
    run = _with_checkpointing(replace(job.run, fast=plan), job.processes, job.listener)
    return _prepare(job, run, load, initial_memory)


def _prepare(job: TrainingJob, run: Run, load: LoadModel, initial_memory: int) -> PreparedRun:
    listener, processes = job.listener, job.processes
    run = with_text_models(run, listener, processes)
    run, reference = precompute_reference(run, listener, processes)
    teacher = precompute_teacher(run, listener, processes)
    listener.stage("loading the model")
    model = load(run, listener)
    if reference is None:
        run, reference = compute_initial_reference(run, model, listener, processes)
    if teacher is not None:
        run = replace(run, data=replace(run.data, train=teacher.rows))
    auxiliary = AuxiliaryOutputs(reference, teacher, run.hooks.create_scorer(run, listener))
    try:
        comparison = check_fast_step(run, model, processes, listener)
    except FastStepError:
        if model.fast is not None:
            model.fast.remove()
        raise
    return PreparedRun(run, model, auxiliary, comparison, initial_memory)


def open_session(
    job: TrainingJob, prepared: PreparedRun, resumed: ResumeState, stack: ExitStack
) -> TrainingSession:
    """Open and lock the run directory until `stack` closes, and create the Trainer."""
    run, model, auxiliary = prepared.run, prepared.model, prepared.auxiliary
    listener, processes, config = job.listener, job.processes, run.config
    processes.from_first(
        lambda: check_disk_space(config.output.dir, config.train, model.model, run.schedule.steps)
    )
    output_dir = processes.from_first(lambda: open_or_resume(run, resumed, listener))
    check_shared(output_dir, processes)
    run, base = store_base(run, output_dir, is_first=processes.is_first)
    file_digests = _lock_output_dir(run, output_dir, stack) if processes.is_first else ()
    if processes.is_first and run.fast.failure and not resumed.failure:
        step = step_of(resumed.checkpoint) if resumed.checkpoint else 0
        output_dir.note({"step": step, PLAIN_STEP: run.fast.failure})
    stack.enter_context(convert_interrupt(output_dir))
    is_sharded = config.train.shard != "none"
    initial_logits = compute_initial_logits(model, run) if is_sharded else None
    trainer = create_trainer(run, model, output_dir, resumed, processes, auxiliary.scorer)
    write_files = partial(save_tokenizer_and_card, run=run, base=base, files=auxiliary.files)
    callbacks = add_callbacks(
        trainer,
        run,
        output_dir,
        listener,
        processes,
        resumed.checkpoint,
        None if model.initial_state else write_files,
    )
    restore_progress(trainer, callbacks, output_dir, resumed, processes)
    watch = stack.enter_context(WatchProcesses(processes, listener.warn))
    hashes = WaitForHashes(each.wait for each in file_digests)
    manifest = trainer.pop_callback(WriteManifest)  # after the caller's, which may write files too
    for callback in (watch, *job.callbacks, hashes, manifest):
        trainer.add_callback(callback)
    if processes.is_first:
        tracked = get_run_info(config.output, resolved_config(run), output_dir, resumed.past)
        writers = tracking(config.output.report_to, tracked, listener)
        callbacks.report.writers += stack.enter_context(writers)
    return TrainingSession(
        job=job,
        run=run,
        model=model,
        auxiliary=auxiliary,
        output_dir=output_dir,
        base=base,
        resumed=resumed,
        trainer=trainer,
        callbacks=callbacks,
        comparison=prepared.comparison,
        initial_logits=initial_logits,
        initial_memory=prepared.initial_memory,
    )


def _lock_output_dir(run: Run, output_dir: RunDirectory, stack: ExitStack) -> Sequence[FileDigests]:
    """Lock the run's directory until `stack` closes, and start to hash the run's input files."""
    stack.enter_context(lock_dir(output_dir.path))
    stack.enter_context(replace_run(output_dir.path))
    file_digests = get_file_digests(run)
    for each in file_digests:
        each.keep(output_dir.checkpoints)
        stack.callback(each.wait)
    return file_digests


def end_finished(job: TrainingJob, output_dir: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Report that a run to be resumed has already finished."""
    if job.processes.is_first:
        record_files_once(output_dir.path)
    message = get_finished_message(output_dir, job.run.config.train, summary)
    job.listener.end({**summary, "nothing_left": message})
