"""Build the Trainer of a run and its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ftlevel.artifacts.checkpoints import step_of
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config.trainer import TrainerConfig
from ftlevel.data.encoding.collate import CollatorWithRows
from ftlevel.evaluation.intervals import should_generate, uses_text_metrics
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.events import Listener
from ftlevel.fast.plan import LIGER_ARGUMENTS
from ftlevel.fast.step_collator import StepCollator, TextCollator
from ftlevel.methods import METHODS
from ftlevel.methods.base import HasState
from ftlevel.methods.rates import HeadRate
from ftlevel.models.hardware import current_memory_bytes, uses_tf32, using_tf32
from ftlevel.models.upstream.libraries import use_one_gpu
from ftlevel.objectives import StepObjective
from ftlevel.trained.generation import GenerationOptions
from ftlevel.training.best import MAX_RECORDED_ROWS, BestModelCallback, PredictionRecorder
from ftlevel.training.callbacks import Interrupt, Report, SetEpoch, UpdateSchedule
from ftlevel.training.gradients import GradientMonitor, Recovery
from ftlevel.training.model import PreparedModel, is_sharded
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes
from ftlevel.training.resume import ResumeState
from ftlevel.training.saving import (
    SMALL_CHECKPOINT,
    SaveByClock,
    WriteManifest,
    checkpoint_bytes,
)
from ftlevel.training.sharding import ShardedTrainer
from ftlevel.training.trainer import FtlevelTrainer, get_train_data

_NUM_LOGS = 20


def create_training_args(run: Run, checkpoint_dir: Path) -> Any:
    """Create the `TrainingArguments` of a run, with checkpoints in `checkpoint_dir`."""
    from transformers import TrainingArguments

    section = run.config.train
    batch_size = section.per_device_train_batch_size
    accumulation_steps = section.gradient_accumulation_steps
    if run.fast.enabled:  # a batch is a whole optimizer step, split by FtlevelTrainer
        batch_size, accumulation_steps = section.rows_per_device_step, 1
    args = TrainingArguments(
        output_dir=str(checkpoint_dir),
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
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation_steps,
        seed=section.seed,
        data_seed=section.order_seed,
        **_logging_and_eval_args(section, run),
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
        # GradientMonitor checks that every trainable tensor gets a gradient. Chunked cross-entropy
        # bypasses the model's outputs, from which DDP would search for unused parameters.
        ddp_find_unused_parameters=False,
        report_to="none",  # trackers are called from `training/callbacks.py`
        disable_tqdm=True,
        # Overlap host-to-device copies with computation.
        dataloader_pin_memory=run.model.device == "cuda",
        accelerator_config={"non_blocking": run.model.device == "cuda"},
        **(LIGER_ARGUMENTS if run.fast.liger_kernel else {}),
    )
    use_one_gpu(args)
    return args


def _logging_and_eval_args(train: TrainerConfig, run: Run) -> dict[str, Any]:
    has_eval_data = bool(run.data.validation)
    strategy = train.eval_strategy or ("steps" if train.eval_steps else "epoch")
    return {
        "logging_strategy": "steps",
        "logging_steps": train.logging_steps
        or (1 if run.hooks.logs_each_step else max(1, run.schedule.steps // _NUM_LOGS)),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # the filter shows a NaN loss as 0.0
        "eval_strategy": strategy if has_eval_data else "no",
        "eval_steps": train.eval_steps,
        "eval_on_start": has_eval_data and (train.eval_on_start or run.objective.evaluates_first),
        "per_device_eval_batch_size": eval_batch_size(train),
    }


def eval_batch_size(train: TrainerConfig) -> int:
    """Returns the batch size per device of an evaluation; by default, that of training."""
    return train.per_device_eval_batch_size or train.per_device_train_batch_size


def create_evaluator(run: Run, processes: Processes, sampler: Any = None) -> Evaluator | None:
    """Create the evaluator of the validation rows; None without validation rows.

    Batches are divided among `processes`; all have equally many if the model is sharded. `sampler`
    is what `TrainingHooks.create_sampler` returned.
    """
    if not run.data.validation:
        return None
    section = run.config.train
    generated = min(section.max_generate_samples, len(run.data.validation))
    uses_text = should_generate(section.predict_with_generate, run.task) and uses_text_metrics(
        section.metrics, run.task
    )
    settings: dict[str, Any] = {
        "rows": run.data.validation,
        "tokenizer": run.model.tokenizer,
        "kind": run.model.kind,
        "objective": run.objective,
        "device": run.model.device,
        "dtype": run.model.dtype,
        "batch_size": eval_batch_size(section),
        "metrics": section.metrics,
        "corpus": run.data.corpus,
        "generated_rows": generated if uses_text or run.objective.samples else 0,
        "writing": GenerationOptions(
            section.max_new_tokens,
            section.num_beams,
            section.temperature,
            section.top_p,
            section.seed,
        ),
        "score_texts": run.task.score_texts,
        "language": run.data.info["target_language"],
        "chunked_cross_entropy": run.fast.chunked_cross_entropy,
    }
    if processes.count > 1:
        settings["divide"] = partial(processes.divide, equally=section.shard != "none")
    return run.hooks.create_evaluator(run, sampler, settings)


def create_trainer(
    run: Run,
    model: PreparedModel,
    output_dir: RunDirectory,
    resume_state: ResumeState,
    processes: Processes,
    listener: Listener | None = None,
) -> FtlevelTrainer:
    """Create the run's Trainer; without `listener`, to compute single steps only."""
    from transformers import PrinterCallback, ProgressCallback

    args = create_training_args(run, output_dir.checkpoints)
    checkpoint = resume_state.checkpoint
    # On resume, evaluate first only if the run was interrupted in an evaluation.
    args.eval_on_start &= checkpoint is None
    args.eval_on_start |= resume_state.missed_evaluation(args.eval_strategy, run.schedule)
    train_dataset, order = get_train_data(run)
    fast, pad_id, method = model.fast, run.model.pad_id, METHODS[run.config.method.kind]
    rate, head_rate = run.schedule.head_learning_rate, None
    if rate is not None and rate != run.schedule.learning_rate:
        head_rate = HeadRate(run.model.new_heads, rate)
    collator = TextCollator if isinstance(run.objective, StepObjective) else StepCollator
    step_collator = collator(pad_id, fast.plan, run.objective) if fast else None
    sampler = run.hooks.create_sampler(run, model, listener)
    trainer_class, kwargs, order = run.hooks.select_trainer(run, sampler, train_dataset, order)
    if is_sharded(model.model) and processes.count > 1:
        trainer_class = ShardedTrainer
    trainer: FtlevelTrainer = (trainer_class or FtlevelTrainer)(
        objective=run.objective,
        loss=run.loss,
        evaluator=create_evaluator(run, processes, sampler),
        model=model.model,
        args=args,
        optimizers=(method.optimizer(run.config.method, model.model, args), None),
        penalty=method.penalty,
        train_dataset=train_dataset,
        eval_dataset=run.data.validation or None,
        data_collator=step_collator or CollatorWithRows(pad_id),
        fast=fast,
        order=order,
        head_rate=head_rate,
        processes=processes,
        grad_cache=run.config.embedding.grad_cache,
        **kwargs,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    if checkpoint:
        trainer.restore_batch(checkpoint)
    return trainer


def matmul_context(run: Run) -> AbstractContextManager[None]:
    """Returns a context that enables TF32 matrix products if configured and supported."""
    return using_tf32(uses_tf32(run.config.train.tf32, run.model.device, run.model.dtype))


@dataclass(frozen=True)
class RunCallbacks:
    """Those callbacks of a run that record results, which are read after training."""

    report: Report
    gradients: GradientMonitor
    interrupt: Interrupt
    best: BestModelCallback | None
    answers: PredictionRecorder


def restore_progress(
    trainer: FtlevelTrainer,
    callbacks: RunCallbacks,
    output_dir: RunDirectory,
    resume_state: ResumeState,
    processes: Processes,
) -> None:
    """On resume, restore the log, best model, and settings reduced after out-of-memory errors."""
    if resume_state.checkpoint is None:
        return
    step = step_of(resume_state.checkpoint)
    callbacks.report.resume(resume_state.checkpoint)
    if processes.is_first:
        callbacks.report.records += output_dir.truncate_log(step)
        output_dir.truncate_events(step)
    trainer.smaller.resume([note for note in output_dir.load_events() if note["step"] <= step])
    if callbacks.best is not None:
        callbacks.best.resume(step, resume_state.past, has_new_length=resume_state.has_new_length)


def add_callbacks(
    trainer: FtlevelTrainer,
    run: Run,
    output_dir: RunDirectory,
    listener: Listener,
    processes: Processes,
    checkpoint: Path | None,
    write_files: Callable[[Path], None] | None,
) -> RunCallbacks:
    """Add all callbacks to `trainer` (modified); returns those that record results.

    `checkpoint` is the one to resume from or None, `listener` gets progress and warnings.
    `write_files` saves tokenizer and card in a checkpoint.
    """
    is_first = processes.is_first
    report = Report(
        listener,
        output_dir.log if is_first else lambda _: None,
        lambda: int(processes.sum(int(trainer.tokens_seen))),
        lambda: current_memory_bytes(run.model.device),
    )
    method = run.config.method
    method_callbacks = METHODS[method.kind].callbacks(method, output_dir.checkpoints, is_first)
    states = [callback for callback in method_callbacks if isinstance(callback, HasState)]
    best = None
    if run.best is not None:
        best = BestModelCallback(run.best, output_dir.checkpoints, processes, states, listener)
    trainer.warn = listener.warn
    trainer.replaces_nonfinite = run.config.train.on_nonfinite != "stop"
    if is_first:
        trainer.note = output_dir.note
    recovery = Recovery(trainer, run.config.train, output_dir, processes, listener, checkpoint)
    gradients = GradientMonitor(
        listener,
        trainer.take_step_loss,
        recovery,
        uses_scaler=trainer.accelerator.scaler is not None,
        delays_checks=run.model.device == "cuda" and recovery.is_always_fatal,
    )
    answers = PredictionRecorder(run.objective, best)
    if trainer.evaluator and len(trainer.evaluator.rows) <= MAX_RECORDED_ROWS:
        trainer.evaluator = replace(trainer.evaluator, begin_record=answers.begin)
    callbacks = RunCallbacks(report, gradients, Interrupt(processes), best, answers)
    run_after_save = trainer.run_after_save if isinstance(trainer, ShardedTrainer) else None
    save_interval = run.config.train.save_minutes if run.config.train.save_strategy != "no" else 0.0
    size = checkpoint_bytes(trainer.model, run.config.train.optim)
    save_last = run.config.train.save_strategy is None and size <= SMALL_CHECKPOINT
    for callback in (
        callbacks.report,
        callbacks.gradients,
        recovery,
        callbacks.interrupt,
        UpdateSchedule(output_dir.load_log(step_of(checkpoint)) if checkpoint else ()),
        SetEpoch(run.data.train, getattr(trainer.order, "base", trainer.order)),
        *method_callbacks,
        *([best] if best else []),
        answers,
        *([SaveByClock(save_interval, processes, last=save_last)] if save_interval else []),
        *trainer.create_callbacks(output_dir, checkpoint),
        WriteManifest(  # last: it lists all files of the checkpoint
            output_dir, run.config.train.save_total_limit, write_files, processes, run_after_save
        ),
    ):
        trainer.add_callback(callback)
    return callbacks
