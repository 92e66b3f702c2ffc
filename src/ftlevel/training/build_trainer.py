"""Build the Trainer of a run and its callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ftlevel.artifacts.checkpoints import step_of
from ftlevel.artifacts.run_directory import ROLLOUTS, RunDirectory
from ftlevel.config import MethodConfig
from ftlevel.config.trainer import TrainerConfig
from ftlevel.data.encoding.collate import CollatorWithRows
from ftlevel.data.prepare.streaming import StreamedRows
from ftlevel.evaluation.intervals import should_generate, uses_text_metrics
from ftlevel.evaluation.rollouts import RewardEvaluator, Rollouts, score_rows
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.evaluation.server import BOUND, ServerSampler
from ftlevel.events import Listener
from ftlevel.fast.plan import kernel_arguments
from ftlevel.fast.step_collator import StepCollator, TextCollator
from ftlevel.methods import METHODS
from ftlevel.methods.base import HasState
from ftlevel.methods.rates import HeadRate
from ftlevel.models.hardware import current_memory_bytes, uses_tf32, using_tf32
from ftlevel.models.upstream.libraries import use_one_gpu
from ftlevel.objectives import PolicyObjective, StepObjective
from ftlevel.tasks.rl.rows import TokenLogps
from ftlevel.trained.generation import GenerationOptions
from ftlevel.training.best import MOST_ROWS, BestModelCallback, PredictionRecorder
from ftlevel.training.callbacks import FollowSettings, Interrupt, Report, SetEpoch
from ftlevel.training.gradients import GradientMonitor, Recovery
from ftlevel.training.model import PreparedModel, is_sharded
from ftlevel.training.plan.run import Run
from ftlevel.training.plan.schedule import count_steps_per_epoch, rows_per_epoch
from ftlevel.training.processes import Processes
from ftlevel.training.resume import ResumeState
from ftlevel.training.rl.step import RolloutFile, bound_of
from ftlevel.training.rl.trainer import RepeatedSteps, RlTrainer
from ftlevel.training.saving import (
    SMALL_CHECKPOINT,
    SaveByClock,
    SaveRollout,
    SaveStreamState,
    WriteManifest,
    checkpoint_bytes,
)
from ftlevel.training.sharding import ShardedTrainer
from ftlevel.training.trainer import FtlevelTrainer, rows_and_order

_LOGS_A_RUN = 20


def build_arguments(run: Run, checkpoints: Path) -> Any:
    """Build the `TrainingArguments` of a run, with checkpoints written to `checkpoints`."""
    from transformers import TrainingArguments

    section = run.config.train
    rows, accumulated = section.per_device_train_batch_size, section.gradient_accumulation_steps
    if run.fast.enabled:  # a batch is a whole optimizer step, split by FtlevelTrainer
        rows, accumulated = rows * accumulated, 1
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=section.num_train_epochs,
        max_steps=section.max_steps or -1,
        learning_rate=run.schedule.learning_rate,
        lr_scheduler_type=section.lr_scheduler_type,
        lr_scheduler_kwargs=dict(section.lr_scheduler_kwargs),
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_epsilon=section.adam_epsilon,
        label_smoothing_factor=section.label_smoothing_factor,
        neftune_noise_alpha=section.neftune_noise_alpha,
        max_grad_norm=section.max_grad_norm,
        optim=section.optim,
        optim_args=",".join(f"{name}={value}" for name, value in section.optim_args.items())
        or None,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulated,
        seed=section.seed,
        data_seed=section.order_seed,
        **_watching(section, run),
        # Callbacks implement `best` and saving by time.
        save_strategy="no"
        if section.save_strategy == "best"
        else section.save_strategy or ("steps" if section.save_steps else "no"),
        save_steps=section.save_steps or 500,
        save_total_limit=None,  # WriteManifest rotates checkpoints
        bf16=run.model.dtype == "bfloat16",
        fp16=run.model.dtype == "float16",
        use_cpu=run.model.device == "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        # GradientProof checks that every trainable tensor gets a gradient. Chunked cross-entropy
        # bypasses the model's outputs, from which DDP would search for unused parameters.
        ddp_find_unused_parameters=False,
        report_to="none",  # trackers are called from `training/callbacks.py`
        disable_tqdm=True,
        # Overlap host-to-device copies with computation.
        dataloader_pin_memory=run.model.device == "cuda",
        accelerator_config={"non_blocking": run.model.device == "cuda"},
        **kernel_arguments(run.config.speed, run.model.device, run.model.family),
    )
    use_one_gpu(arguments)
    return arguments


def _watching(train: TrainerConfig, run: Run) -> dict[str, Any]:
    """Returns those arguments of `TrainingArguments` that configure logging and evaluation."""
    evaluates = bool(run.data.validation)
    strategy = train.eval_strategy or ("steps" if train.eval_steps else "epoch")
    return {
        "logging_strategy": "steps",
        "logging_steps": train.logging_steps
        or (1 if is_rl(run) else max(1, run.schedule.steps // _LOGS_A_RUN)),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # the filter shows a NaN loss as 0.0
        "eval_strategy": strategy if evaluates else "no",
        "eval_steps": train.eval_steps,
        "eval_on_start": evaluates and (train.eval_on_start or reports_base(run)),
        "per_device_eval_batch_size": eval_batch_size(train),
    }


def is_rl(run: Run) -> bool:
    """Whether the run trains on completions that it samples itself (`--task rl`)."""
    return isinstance(run.objective, PolicyObjective)


def reports_base(run: Run) -> bool:
    """Whether the model is evaluated before the first step even without `--eval-on-start`."""
    return is_rl(run) or isinstance(run.objective, StepObjective)


def eval_batch_size(train: TrainerConfig) -> int:
    """Returns the batch size of evaluation."""
    return train.per_device_eval_batch_size or train.per_device_train_batch_size


def build_rollouts(
    run: Run,
    model: Any,
    teacher: TokenLogps | None = None,
    server: ServerSampler | None = None,
    where: Callable[[int], str] | None = None,
) -> Rollouts:
    """Build the sampler of completions for reinforcement learning, with the weights of `model`.

    `teacher` scores completions in on-policy distillation; `server` samples instead of `model`.
    `where` returns a row's location for messages, by default that of a training row.
    """
    planned = run.model
    return Rollouts(
        model,
        planned.tokenizer,
        run.config.rl,
        run.rewards,
        run.config.train.order_seed,
        kind=planned.kind,
        method=run.config.method.kind,
        device=planned.device,
        dtype=planned.dtype,
        get_position=where or run.data.table.where,
        teacher=teacher,
        server=server,
    )


def _build_server(run: Run, adapted: PreparedModel) -> ServerSampler | None:
    """Build the sampler of the server named by `--rollouts`; None without the flag."""
    if run.config.rl.rollouts is None or not isinstance(run.objective, PolicyObjective):
        return None
    score = partial(
        score_rows,
        adapted.model,
        run.objective,
        pad_id=run.model.pad_id,
        device=run.model.device,
        dtype=run.model.dtype,
    )
    method = run.config.method
    return ServerSampler(run.config.rl.rollouts, adapted.model, method, adapted.start, score)


def build_evaluator(
    run: Run,
    model: Any = None,
    teacher: TokenLogps | None = None,
    server: ServerSampler | None = None,
) -> Evaluator | None:
    """Build the evaluator of the validation rows; None if there are none.

    In reinforcement learning, completions are sampled from `model`; see `build_rollouts`.
    """
    if not run.data.validation:
        return None
    section = run.config.train
    generated = min(section.max_generate_samples, len(run.data.validation))
    shared: dict[str, Any] = {
        "rows": run.data.validation,
        "tokenizer": run.model.tokenizer,
        "kind": run.model.kind,
        "objective": run.objective,
        "device": run.model.device,
        "dtype": run.model.dtype,
        "batch_size": eval_batch_size(section),
        "metrics": section.metrics,
        "corpus": run.data.corpus,
    }
    if is_rl(run):
        rollouts = build_rollouts(
            run, model, teacher, server, lambda row: f"validation row {row + 1}"
        )
        return RewardEvaluator(**shared, generated_rows=generated, rollouts=rollouts)
    generates = should_generate(section.predict_with_generate, run.task)
    return Evaluator(
        **shared,
        generated_rows=generated
        if generates and uses_text_metrics(section.metrics, run.task)
        else 0,
        writing=GenerationOptions(
            section.max_new_tokens,
            section.num_beams,
            section.temperature,
            section.top_p,
            section.seed,
        ),
        score_texts=run.task.score_texts,
        language=run.data.info["target_language"],
        chunked_cross_entropy=run.fast.chunked_cross_entropy,
    )


def build_trainer(
    run: Run,
    adapted: PreparedModel,
    directory: RunDirectory,
    resumed: ResumeState,
    processes: Processes,
    teacher: TokenLogps | None = None,
) -> FtlevelTrainer:
    """Build the run's Trainer, without transformers' callbacks that print.

    `teacher` scores completions in on-policy distillation.
    """
    from transformers import PrinterCallback, ProgressCallback

    arguments = build_arguments(run, directory.checkpoints)
    checkpoint = resumed.checkpoint
    # On resume, evaluate first only if the run was interrupted in an evaluation.
    arguments.eval_on_start &= checkpoint is None
    arguments.eval_on_start |= _owes_evaluation(resumed, run, arguments)
    rows, order = rows_and_order(run, arguments, processes)
    fast, pad_id = adapted.fast, run.model.pad_id
    rate, head_rate = run.schedule.head_learning_rate, None
    if rate is not None and rate != run.schedule.learning_rate:
        head_rate = HeadRate(run.model.new_heads, rate)
    collator = TextCollator if isinstance(run.objective, StepObjective) else StepCollator
    step_collator = collator(pad_id, fast.plan, run.objective) if fast else None
    server = _build_server(run, adapted)
    trainer_class: Any = FtlevelTrainer
    options: dict[str, Any] = {}
    if is_sharded(adapted.model) and processes.count > 1:
        trainer_class = ShardedTrainer
    elif is_rl(run):
        bound = BOUND if server else bound_of(run.model.dtype, run.model.quant.kind)
        rollouts = build_rollouts(run, adapted.model, teacher, server)
        trainer_class, options = RlTrainer, {"rollouts": rollouts, "prompts": rows, "bound": bound}
        if order is not None and run.config.rl.num_iterations > 1:
            step = arguments.train_batch_size * arguments.gradient_accumulation_steps
            step *= arguments.world_size
            order = RepeatedSteps(order, step, run.config.rl.num_iterations)
    trainer: FtlevelTrainer = trainer_class(
        objective=run.objective,
        loss=run.loss,
        evaluator=build_evaluator(run, adapted.model, teacher, server),
        model=adapted.model,
        args=arguments,
        optimizers=(build_optimizer(run.config.method, adapted.model, arguments), None),
        penalty=METHODS[run.config.method.kind].penalty,
        train_dataset=rows,
        eval_dataset=run.data.validation or None,
        data_collator=step_collator or CollatorWithRows(pad_id),
        fast=fast,
        order=order,
        head_rate=head_rate,
        processes=processes,
        grad_cache=run.config.embedding.grad_cache,
        **options,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    if isinstance(rows, StreamedRows) and checkpoint:
        rows.restore(checkpoint)
    if isinstance(trainer, RlTrainer) and checkpoint:
        trainer.restore_rollout(checkpoint)
    return trainer


def _owes_evaluation(resumed: ResumeState, run: Run, arguments: Any) -> bool:
    config, steps = run.config, run.schedule.steps
    rows = rows_per_epoch(config.train, config.steps_per_rollout, run.data)
    steps_per_epoch = steps if run.data.stream else count_steps_per_epoch(config.train, rows)
    return resumed.missed_evaluation(arguments.eval_strategy, steps_per_epoch, steps)


def build_optimizer(method: MethodConfig, model: Any, arguments: Any) -> Any:
    """Build the optimizer that the method defines; None to use the one that Trainer creates."""
    return METHODS[method.kind].optimizer(method, model, arguments)


def matmul_context(run: Run) -> AbstractContextManager[None]:
    """Returns a context that enables TF32 matrix products if configured and supported."""
    return using_tf32(uses_tf32(run.config.train.tf32, run.model.device, run.model.dtype))


@dataclass(frozen=True)
class RunCallbacks:
    """Callbacks whose results are read after training."""

    report: Report
    gradients: GradientMonitor
    interrupt: Interrupt
    best: BestModelCallback | None
    answers: PredictionRecorder


def rollout_callbacks(
    trainer: FtlevelTrainer, directory: RunDirectory, processes: Processes, checkpoint: Path | None
) -> list[Any]:
    """Let an `RlTrainer` write rollouts.jsonl; returns callbacks that save its rollouts."""
    if not isinstance(trainer, RlTrainer):
        return []
    trainer.keep = file = RolloutFile(directory.path / ROLLOUTS, processes)
    file.rewind(step_of(checkpoint) if checkpoint else 0)
    return [SaveRollout(trainer.save_rollout, directory.checkpoints)]


def restore_progress(
    trainer: FtlevelTrainer,
    watch: RunCallbacks,
    directory: RunDirectory,
    resumed: ResumeState,
    processes: Processes,
) -> None:
    """Restore the progress of `trainer` and the callbacks `watch` (modified) from a checkpoint."""
    if resumed.checkpoint is None:
        return
    step = step_of(resumed.checkpoint)
    if processes.is_first:
        watch.report.records += directory.truncate_log(step)
        directory.truncate_events(step)
    trainer.smaller.resume([note for note in directory.load_events() if note["step"] <= step])
    if watch.best is not None:
        watch.best.resume(step, resumed.past, has_new_length=resumed.has_new_length)


def add_callbacks(
    trainer: FtlevelTrainer,
    run: Run,
    directory: RunDirectory,
    listener: Listener,
    processes: Processes,
    checkpoint: Path | None,
    write_files: Callable[[Path], None] | None,
) -> RunCallbacks:
    """Add all callbacks to `trainer` (modified); returns those whose results are read later.

    `checkpoint` is the one to resume from; `write_files` is passed to `WriteManifest`.
    """

    def tell_nobody(_: Mapping[str, Any]) -> None:
        """Discard the record; only the first process writes the log."""

    is_first, rows = processes.is_first, trainer.train_dataset
    report = Report(
        listener,
        directory.log if is_first else tell_nobody,
        lambda: int(trainer.tokens_seen),
        lambda: current_memory_bytes(run.model.device),
    )
    method = run.config.method
    method_callbacks = METHODS[method.kind].callbacks(method, directory.checkpoints, is_first)
    states = [callback for callback in method_callbacks if isinstance(callback, HasState)]
    best = None
    if run.best is not None:
        best = BestModelCallback(run.best, directory.checkpoints, processes, states, listener)
    trainer.warn = listener.warn
    trainer.replaces_nonfinite = run.config.train.on_nonfinite != "stop"
    if is_first:
        trainer.note = directory.note
    recovery = Recovery(trainer, run.config.train, directory, processes, listener, checkpoint)
    gradients = GradientMonitor(
        listener,
        trainer.take_step_loss,
        recovery,
        scales=trainer.accelerator.scaler is not None,
        defers=run.model.device == "cuda" and recovery.only_stops,
    )
    answers = PredictionRecorder(run.objective, best)
    if is_first and trainer.evaluator and len(trainer.evaluator.rows) <= MOST_ROWS:
        trainer.evaluator = replace(trainer.evaluator, begin_record=answers.begin)
    watch = RunCallbacks(report, gradients, Interrupt(processes), best, answers)
    streamed = isinstance(rows, StreamedRows)
    when_written = trainer.when_written if isinstance(trainer, ShardedTrainer) else None
    minutes = run.config.train.save_minutes if run.config.train.save_strategy != "no" else 0.0
    size = checkpoint_bytes(trainer.model, run.config.train.optim)
    saves_end = run.config.train.save_strategy is None and size <= SMALL_CHECKPOINT
    for callback in (
        watch.report,
        watch.gradients,
        recovery,
        watch.interrupt,
        FollowSettings(),
        SetEpoch(run.data.train, getattr(trainer.order, "base", trainer.order)),
        *method_callbacks,
        *([best] if best else []),
        answers,
        *([SaveByClock(minutes, processes, last=saves_end)] if minutes else []),
        *([SaveStreamState(rows, directory.checkpoints)] if streamed else []),
        *rollout_callbacks(trainer, directory, processes, checkpoint),
        WriteManifest(  # last: it lists all files of the checkpoint
            directory, run.config.train.save_total_limit, write_files, processes, when_written
        ),
    ):
        trainer.add_callback(callback)
    return watch
