"""Resolve a training job, load and adapt its model, train, save, and verify what was saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
    record_files_once,
    replace_run,
)
from ftlevel.config import DataConfig, InMemoryDataset, QuantConfig, TrainConfig
from ftlevel.config.sections import wrap_rows
from ftlevel.errors import ConfigError, Interrupted
from ftlevel.events import Listener
from ftlevel.fast.plan import plan_plain
from ftlevel.models.hardware import free_device_memory, resident_bytes, trim_heap
from ftlevel.models.in_memory import PlacedModel, place_model
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
from ftlevel.training.forecast.fits import Device, MemoryEstimate, estimate_memory, fit_run
from ftlevel.training.identity import FileDigests, get_file_digests
from ftlevel.training.model import PreparedModel, get_speed_info
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
    resolve_resume,
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
    TeacherPredictions,
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
    """What `train` is called with.

    Rows, model and tokenizer are None if the configuration names them; `callbacks` are called after
    ftlevel's own. `recipe` is path and git state of a recipe file, `start` the time of the call.
    """

    config: TrainConfig
    dataset: Any = None
    eval_dataset: Any = None
    model: Any = None
    tokenizer: Any = None
    callbacks: Sequence[TrainerCallback] = ()
    recipe: Mapping[str, Any] | None = None
    start: StartTime = field(default_factory=StartTime.now)

    def bind(self, stack: ExitStack) -> tuple[TrainConfig, PlacedModel | None]:
        """Returns the configuration with the objects' names, and the model's files, if any.

        The files exist until `stack` closes.
        """
        config = self.config
        _check_callbacks(self.callbacks)
        rows = {"dataset": self.dataset, "validation_file": self.eval_dataset}
        names = {
            key: _name(key, value, config.data) for key, value in rows.items() if value is not None
        }
        if names:
            config = config.with_sections(data=config.data.model_copy(update=names))
        if self.model is None and self.tokenizer is None:
            return config, None
        workspace = stack.enter_context(Workspace("model"))
        placed = place_model(self.model, self.tokenizer, config.model, Path(workspace))
        updates: dict[str, Any] = {
            "model": config.model.model_copy(update={"name_or_path": placed.name})
        }
        if placed.quant is not None:
            updates["quant"] = _resolve_quant(config.quant, placed.quant)
        return config.with_sections(**updates), placed


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


@dataclass
class TrainingSession:
    """A run in this process: its model, Trainer and run directory, as they come into being.

    The methods are called in their order; `commands/train.py` shows them on one screen.

    Attributes:
        stack: closes what the session opens.
        memory: the estimate printed at the start.
        resumed: checkpoint, log and changes of the run to resume; set by `resolve_resume`.
        model: the loaded model; set by `prepare`, which also adds the outputs of auxiliary models
            to the rows of `run`, with `teacher`, the teacher's predictions, or None.
        comparison: result of verifying the fast step; None if it was not verified.
        initial_memory: bytes of the process before the model was loaded.
        base: name, kind and fingerprint of the base model, for card and summary; set, with
            `output_dir`, `trainer` and `callbacks`, by `open`.
        initial_logits: logits before training; None unless `--method full` is sharded.
        selected: the selected model; None before training, or if none is selected.
        trained_at: end of training, by `time.perf_counter`.
    """

    inputs: TrainInputs
    listener: Listener
    stack: ExitStack
    processes: Processes
    run: Run
    memory: MemoryEstimate
    resumed: ResumeState = field(default_factory=ResumeState)
    model: PreparedModel = field(init=False)
    teacher: TeacherPredictions | None = None
    comparison: StepComparison | None = None
    initial_memory: int = 0
    output_dir: RunDirectory = field(init=False)
    base: Mapping[str, Any] = field(init=False)
    trainer: FtlevelTrainer = field(init=False)
    callbacks: RunCallbacks = field(init=False)
    initial_logits: Tensor | None = None
    selected: SelectedModel | None = None
    trained_at: float = 0.0

    @classmethod
    def start(
        cls, inputs: TrainInputs, listener: Listener, stack: ExitStack, *, dry_run: bool
    ) -> TrainingSession:
        """Resolve and show the run of `inputs`; an error in one process is raised in all."""
        config, placed = inputs.bind(stack)
        processes = started_processes()
        train = resolve_processes(config.train, processes, is_dry_run=dry_run)
        config = config.model_copy(update={"train": train})
        if dry_run:  # one process is enough
            processes = Processes()
        processes.join()

        def resolve_locally() -> tuple[Run, MemoryEstimate]:
            run, memory = _resolve(config, placed, listener, processes.count, try_method=dry_run)
            processes.select_device(run.model.device)
            check_can_shard(run, None if dry_run else processes.count)
            return run, memory

        run, memory = processes.in_all(resolve_locally)
        if transports := processes.disable_unsupported_transports(run.model.device):
            listener.choices("train", transports)
        session = cls(inputs, listener, stack, processes, run, memory)
        session.run = session._fit(run)
        return session

    def _fit(self, run: Run) -> Run:
        """Returns `run` with the micro-batch and checkpointing that the first process estimates."""
        device = Device.of_process(run.model.device, self.processes.count)
        previous = load_previous_batch_tokens(run.config.output)
        fit = self.processes.from_first(lambda: fit_run(run, device, previous))
        self.listener.choices("train", fit.choices)
        return fit.apply(run)

    def resolve_resume(self) -> Mapping[str, Any] | None:
        """Find the checkpoint to resume from; returns summary.json of a run that has finished."""
        self.resumed = resolve_resume(self.run, self.processes, self.listener)
        finished, output = self.resumed.finished, self.run.config.output.dir
        if finished is None or output is None:
            return None
        output_dir = RunDirectory(output)
        if self.processes.is_first:
            record_files_once(output)
        message = get_finished_message(output_dir, self.run.config.train, finished)
        self.listener.end({**finished, "nothing_left": message})
        return finished

    def prepare(self, load: LoadModel) -> None:
        """Compute the outputs of auxiliary models, `load` the model, and verify its fast step.

        If the fast step is not the plain one, or was not when the run to resume started, all is
        done again for the plain step; with `--verify-fast`, FastStepError is raised instead.
        """
        self.initial_memory = resident_bytes()
        failure, when = self.resumed.failure, " when the run started"
        if not failure:
            try:
                return self._prepare(self.run, load)
            except FastStepError as error:
                if self.run.config.speed.verify:
                    raise
                failure, when = error.problem, ""
            free_device_memory()
        report = "" if when else " Please report this with the command."
        self.listener.warn(
            f"fast step disabled{when}: {failure}; training with the plain step.{report}"
        )
        plan = replace(plan_plain(self.run.objective, self.run.fast.tokens), failure=failure)
        return self._prepare(self._fit(replace(self.run, fast=plan)), load)

    def _prepare(self, run: Run, load: LoadModel) -> None:
        listener, processes = self.listener, self.processes
        run = with_text_models(run, listener, processes)
        run = run.hooks.with_auxiliary_outputs(run, listener, processes)
        teacher = precompute_teacher(run, listener, processes)
        listener.stage("loading the model")
        model = load(run, listener)
        run = run.hooks.with_initial_outputs(run, model, listener, processes)
        if teacher is not None:
            run = replace(run, data=replace(run.data, train=teacher.rows))
        try:
            self.comparison = check_fast_step(run, model, processes, listener)
        except FastStepError:
            if model.fast is not None:
                model.fast.remove()
            raise
        self.run, self.model, self.teacher = run, model, teacher

    def open(self) -> None:
        """Open and lock the run directory, and create the Trainer with its callbacks."""
        model, resumed = self.model, self.resumed
        listener, processes = self.listener, self.processes
        config = self.run.config
        processes.from_first(
            lambda: check_disk_space(
                config.output.dir, config.train, model.model, self.run.schedule.steps
            )
        )
        output_dir = processes.from_first(lambda: open_or_resume(self.run, resumed, listener))
        check_shared(output_dir, processes)
        run, base = store_base(self.run, output_dir, is_first=processes.is_first)
        self.run, self.base, self.output_dir = run, base, output_dir
        digests = get_file_digests(run, output_dir.checkpoints)
        if processes.is_first:
            self._lock(digests)
        if processes.is_first and run.fast.failure and not resumed.failure:
            step = step_of(resumed.checkpoint) if resumed.checkpoint else 0
            output_dir.note({"step": step, PLAIN_STEP: run.fast.failure})
        self.stack.enter_context(convert_interrupt(output_dir))
        if self.is_sharded:
            self.initial_logits = compute_initial_logits(model, run)
        self.trainer = create_trainer(run, model, output_dir, resumed, processes, listener)
        write_files = partial(save_tokenizer_and_card, run=run, base=base)
        self.callbacks = add_callbacks(
            self.trainer,
            run,
            output_dir,
            listener,
            processes,
            resumed.checkpoint,
            None if model.initial_state else write_files,
        )
        restore_progress(self.trainer, self.callbacks, output_dir, resumed, processes)
        self._add_last_callbacks(digests)

    def _lock(self, digests: FileDigests) -> None:
        """Lock the run's directory until `stack` closes, and start to hash the run's inputs."""
        self.stack.enter_context(lock_dir(self.output_dir.path))
        self.stack.enter_context(replace_run(self.output_dir.path))
        digests.keep()
        self.stack.callback(digests.wait)

    def _add_last_callbacks(self, digests: FileDigests) -> None:
        watch = self.stack.enter_context(WatchProcesses(self.processes, self.listener.warn))
        # The caller's may write files too.
        manifest = self.trainer.pop_callback(WriteManifest)
        for callback in (watch, *self.inputs.callbacks, WaitForHashes([digests.wait]), manifest):
            self.trainer.add_callback(callback)
        if self.processes.is_first:
            output, run_info = self.run.config.output, resolved_config(self.run)
            tracked = get_run_info(output, run_info, self.output_dir, self.resumed.past)
            writers = tracking(output.report_to, tracked, self.listener)
            self.callbacks.report.writers += self.stack.enter_context(writers)

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
        self.listener.stage("training")
        with self.callbacks.interrupt, explain_disk_errors(self.output_dir), matmul_context(run):
            if checkpoint is None:
                run.hooks.check_trainer(trainer, run.data.train, self.listener)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        interrupt = self.callbacks.interrupt
        if interrupt.has_stopped:
            raise Interrupted(
                get_interrupt_message(self.output_dir, trainer.state), interrupt.exit_code
            )

    def evaluate(self) -> None:
        """Evaluate the final model, unless it was already evaluated after the last step."""
        with matmul_context(self.run):
            records = self.processes.from_first(lambda: self.callbacks.report.records)
            end_training(self.trainer, records)
            if not self.is_sharded:
                step = self.selected.step if self.selected else self.trainer.state.global_step
                self.callbacks.answers.complete(self.trainer.evaluator, self.trainer.model, step)
        trim_heap()

    def save(self) -> None:
        """Write the adapter or the full model with the tokenizer and card."""
        self.listener.stage("saving and verifying")

        def write(weights: Mapping[str, Any] | None = None) -> None:
            save(self.model, self.run, self.output_dir, self.base, weights)

        with explain_disk_errors(self.output_dir):
            if self.is_sharded:
                save_sharded(self.model, self.run, self.processes, write)
            else:
                write()

    def verify(self) -> Proof:
        """Compare the saved files with the trained model; raise RunError if they differ."""
        model, run, output_dir = self.model, self.run, self.output_dir
        gradients, processes = self.callbacks.gradients, self.processes
        with explain_disk_errors(output_dir):
            if self.is_sharded:
                logits = self.initial_logits
                return verify_sharded_run(model, run, output_dir, gradients, processes, logits)
            why_no_effect = run.hooks.explain_no_effect(run, self.callbacks.report.records)
            return verify_run(model, run, output_dir, gradients, why_no_effect)

    def report(self, proof: Proof) -> Mapping[str, Any]:
        """Write and show the results of the run; returns the contents of summary.json."""
        callbacks, trainer = self.callbacks, self.trainer
        tokens, records = callbacks.report.tokens or 0, callbacks.report.records
        outcome = Outcome(
            run=self.output_dir.path,
            recipe=self.inputs.recipe,
            base=self.base,
            model=self.model.model,
            records=records,
            proof=proof,
            steps=trainer.state.global_step,
            timings=measure_times(callbacks.report, self.inputs.start, self.trained_at, tokens),
            evaluator=trainer.evaluator,
            answers=callbacks.answers,
            speed=get_speed_info(trainer, self.run.fast.failure, self.comparison),
            selected=self.selected,
            changes=self.output_dir.load_changes(),
            skipped_steps=[note for note in self.output_dir.load_events() if "how" in note],
            plan=self.memory.compare(self.initial_memory),
        )
        facts, notes = self.run.hooks.describe(self.run, records)
        if self.teacher is not None:
            facts["distillation"] = dict(self.teacher.facts)
        for note in notes:
            self.listener.warn(note)
        return report_results(self.run, outcome, self.output_dir, self.listener, facts)


LoadModel = Callable[[Run, Listener], PreparedModel]


def _resolve(
    config: TrainConfig,
    placed: PlacedModel | None,
    listener: Listener,
    world_size: int,
    *,
    try_method: bool,
) -> tuple[Run, MemoryEstimate]:
    output = config.output
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
    if placed is not None:
        run = replace(run, choices=[placed.choice, *run.choices], written_base=placed.directory)
    check_base_not_overwritten(run)
    run = replace(run, auxiliary=resolve_auxiliary_models(run))
    run.hooks.check_run(run)
    sizes = size_choices(run, build_modules=try_method)
    memory = estimate_memory(run, world_size)
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
