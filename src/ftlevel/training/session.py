"""Resolve a training job, load and adapt its model, and train it; `finish.py` saves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
from ftlevel.methods import METHODS
from ftlevel.methods.base import HasState
from ftlevel.models.hardware import current_memory_bytes, free_device_memory, resident_bytes
from ftlevel.models.in_memory import PlacedModel, place_model
from ftlevel.training.best import (
    MAX_RECORDED_ROWS,
    BestModelCallback,
    PredictionRecorder,
    SelectedModel,
)
from ftlevel.training.build_trainer import create_trainer, matmul_context
from ftlevel.training.callbacks import (
    Interrupt,
    Report,
    RunInfo,
    SetEpoch,
    UpdateSchedule,
    tracking,
)
from ftlevel.training.forecast.fits import Device, MemoryEstimate, estimate_memory, fit_run
from ftlevel.training.gradients import GradientMonitor, Recovery
from ftlevel.training.model import PreparedModel
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
from ftlevel.training.resume import (
    PLAIN_STEP,
    ResumeState,
    check_base_not_overwritten,
    check_shared,
    convert_interrupt,
    get_finished_message,
    get_interrupt_message,
    keep_digests,
    load_previous_batch_tokens,
    open_or_resume,
    resolve_resume,
    store_base,
)
from ftlevel.training.saving import (
    SMALL_CHECKPOINT,
    SaveByClock,
    WriteManifest,
    check_disk_space,
    checkpoint_bytes,
    explain_disk_errors,
)
from ftlevel.training.sharding import ShardedTrainer, check_can_shard, compute_initial_logits
from ftlevel.training.step_comparison import FastStepError, StepComparison
from ftlevel.training.summary import resolved_config, save_tokenizer_and_card
from ftlevel.training.teacher import precompute_teacher, resolve_auxiliary_models
from ftlevel.training.trainer import FtlevelTrainer
from ftlevel.training.verify import check_fast_step

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class StartTime:
    """Time at which the user started the run, and CPU seconds of all threads up to that time."""

    at: float
    cpu_s: float

    @classmethod
    def now(cls) -> StartTime:
        """Returns the current time: the start of a run called from Python."""
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def of_process(cls) -> StartTime:
        """Returns the creation time of the process: the start of a run from the command line."""
        import psutil

        age = time.time() - psutil.Process().create_time()
        return cls(time.perf_counter() - age, 0.0)


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
            to the rows of `run`.
        teacher_info: entry of the teacher in summary.json; None without a teacher.
        comparison: result of verifying the fast step; None if it was not verified.
        initial_memory: bytes of the process before the model was loaded.
        base: name, kind and fingerprint of the base model, for card and summary; set, with
            `output_dir`, `trainer` and its callbacks, by `open`.
        results: log of the run.
        best: keeps the best model; None if none is selected.
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
    teacher_info: dict[str, Any] | None = None
    comparison: StepComparison | None = None
    initial_memory: int = 0
    output_dir: RunDirectory = field(init=False)
    base: Mapping[str, Any] = field(init=False)
    trainer: FtlevelTrainer = field(init=False)
    results: Report = field(init=False)
    gradients: GradientMonitor = field(init=False)
    interrupt: Interrupt = field(init=False)
    answers: PredictionRecorder = field(init=False)
    best: BestModelCallback | None = None
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
        run = run.hooks.with_auxiliary_outputs(run, listener, processes)
        teacher = precompute_teacher(run, listener, processes)
        listener.stage("loading the model")
        model = load(run, listener)
        run = run.hooks.with_initial_outputs(run, model, listener, processes)
        rows, self.teacher_info = teacher or (run.data.train, None)
        run = replace(run, data=replace(run.data, train=rows))
        try:
            self.comparison = check_fast_step(run, model, processes, listener)
        except FastStepError:
            if model.fast is not None:
                model.fast.remove()
            raise
        self.run, self.model = run, model

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
        hashing = self._lock() if processes.is_first else None
        if processes.is_first and run.fast.failure and not resumed.failure:
            step = step_of(resumed.checkpoint) if resumed.checkpoint else 0
            output_dir.note({"step": step, PLAIN_STEP: run.fast.failure})
        self.stack.enter_context(convert_interrupt(output_dir))
        if self.is_sharded:
            self.initial_logits = compute_initial_logits(model, run)
        self.trainer = create_trainer(run, model, output_dir, resumed, processes, listener)

        def write_files(checkpoint: Path) -> None:
            if hashing is not None:
                hashing.result()
            if not model.initial_state:
                save_tokenizer_and_card(checkpoint, run, base)

        self._add_callbacks(write_files)
        self._restore_progress()

    def _lock(self) -> Future[None]:
        """Lock the run's directory until `stack` closes, and start to hash the base's files."""
        self.stack.enter_context(lock_dir(self.output_dir.path))
        self.stack.enter_context(replace_run(self.output_dir.path))
        pool = self.stack.enter_context(ThreadPoolExecutor(1))
        return pool.submit(keep_digests, self.run, self.output_dir, self.resumed.identity)

    def _add_callbacks(self, write_files: Callable[[Path], None]) -> None:
        """Add all callbacks to the Trainer; `write_files` saves tokenizer and card in a checkpoint.

        The caller's are the last but that of the manifest, which lists all files of a checkpoint.
        """
        run, trainer, listener = self.run, self.trainer, self.listener
        processes, output_dir, checkpoint = self.processes, self.output_dir, self.resumed.checkpoint
        section, method, is_first = run.config.train, run.config.method, self.processes.is_first
        self.results = Report(
            listener,
            output_dir.log if is_first else lambda _: None,
            lambda: int(processes.sum(int(trainer.tokens_seen))),
            lambda: current_memory_bytes(run.model.device),
        )
        method_callbacks = METHODS[method.kind].callbacks(method, output_dir.checkpoints, is_first)
        states = [callback for callback in method_callbacks if isinstance(callback, HasState)]
        if run.best is not None:
            self.best = BestModelCallback(
                run.best, output_dir.checkpoints, processes, states, listener
            )
        trainer.warn = listener.warn
        trainer.replaces_nonfinite = section.on_nonfinite != "stop"
        if is_first:
            trainer.note = output_dir.note
        recovery = Recovery(trainer, section, output_dir, processes, listener, checkpoint)
        self.gradients = GradientMonitor(
            listener,
            trainer.take_step_loss,
            recovery,
            uses_scaler=trainer.accelerator.scaler is not None,
            delays_checks=run.model.device == "cuda" and recovery.is_always_fatal,
        )
        self.interrupt = Interrupt(processes)
        self.answers = PredictionRecorder(run.objective, self.best)
        if trainer.evaluator and len(trainer.evaluator.rows) <= MAX_RECORDED_ROWS:
            trainer.evaluator = replace(trainer.evaluator, begin_record=self.answers.begin)
        size = checkpoint_bytes(trainer.model, section.optim)
        save_last = section.save_strategy is None and size <= SMALL_CHECKPOINT
        by_clock = section.save_minutes and section.save_strategy != "no"
        run_after_save = trainer.run_after_save if isinstance(trainer, ShardedTrainer) else None
        for callback in (
            self.results,
            self.gradients,
            recovery,
            self.interrupt,
            UpdateSchedule(output_dir.load_log(step_of(checkpoint)) if checkpoint else ()),
            SetEpoch(run.data.train, getattr(trainer.order, "base", trainer.order)),
            *method_callbacks,
            *([self.best] if self.best else []),
            self.answers,
            *([SaveByClock(section.save_minutes, processes, last=save_last)] if by_clock else []),
            *trainer.create_callbacks(output_dir, checkpoint),
            self.stack.enter_context(WatchProcesses(processes, listener.warn)),
            *self.inputs.callbacks,
            WriteManifest(
                output_dir, section.save_total_limit, write_files, processes, run_after_save
            ),
        ):
            trainer.add_callback(callback)
        if is_first:
            output, past = run.config.output, self.resumed.past
            info = RunInfo(
                output_dir.path,
                output.run_name or output_dir.path.name,
                output.tracker_project,
                resolved_config(run),
                past[-1]["step"] if past else 0,
            )
            writers = tracking(output.report_to, info, listener)
            self.results.writers += self.stack.enter_context(writers)

    def _restore_progress(self) -> None:
        """On resume, restore log, best model, and settings reduced after out-of-memory errors."""
        resumed, output_dir = self.resumed, self.output_dir
        if resumed.checkpoint is None:
            return
        step = step_of(resumed.checkpoint)
        self.results.resume(resumed.checkpoint)
        if self.processes.is_first:
            self.results.records += output_dir.truncate_log(step)
            output_dir.truncate_events(step)
        notes = [note for note in output_dir.load_events() if note["step"] <= step]
        self.trainer.smaller.resume(notes)
        if self.best is not None:
            self.best.resume(step, resumed.past, has_new_length=resumed.has_new_length)

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
        state = self.trainer.state
        if self.best is not None:
            self.selected = self.best.finish(self.trainer.model, state.global_step, state.max_steps)
        self.trainer.gather_failures()
        self.trained_at = time.perf_counter()

    def _train(self) -> None:
        run, trainer, checkpoint = self.run, self.trainer, self.resumed.checkpoint
        self.listener.stage("training")
        with self.interrupt, explain_disk_errors(self.output_dir), matmul_context(run):
            if checkpoint is None:
                run.hooks.check_trainer(trainer, run.data.train, self.listener)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        interrupt = self.interrupt
        if interrupt.has_stopped:
            raise Interrupted(
                get_interrupt_message(self.output_dir, trainer.state), interrupt.exit_code
            )


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
