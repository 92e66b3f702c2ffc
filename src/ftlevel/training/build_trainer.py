"""Build the Trainer of a run and its callbacks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config.trainer import TrainerConfig
from ftlevel.data.encoding.collate import CollatorWithRows
from ftlevel.evaluation.intervals import should_generate, uses_text_metrics
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.events import Listener
from ftlevel.fast.plan import LIGER_ARGUMENTS
from ftlevel.methods import METHODS
from ftlevel.methods.rates import HeadRate
from ftlevel.models.hardware import uses_tf32, using_tf32
from ftlevel.models.upstream.libraries import use_one_gpu
from ftlevel.tasks import BaseTask
from ftlevel.trained.generation import GenerationOptions
from ftlevel.training.model import PreparedModel, is_sharded
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes
from ftlevel.training.resume import ResumeState
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
        "language": run.data.info["target_language"],
        "chunked_cross_entropy": run.fast.chunked_cross_entropy,
        **get_generation_settings(section, run.task, len(run.data.validation)),
    }
    if run.objective.samples:
        settings["generated_rows"] = min(section.max_generate_samples, len(run.data.validation))
    if processes.count > 1:
        settings["divide"] = partial(processes.divide, equally=section.shard != "none")
    return run.hooks.create_evaluator(run, sampler, settings)


def get_generation_settings(train: TrainerConfig, task: BaseTask, num_rows: int) -> dict[str, Any]:
    """Returns the arguments of `Evaluator` about generated texts; `num_rows` are evaluated."""
    generates = should_generate(train.predict_with_generate, task)
    uses_texts = generates and uses_text_metrics(train.metrics, task)
    return {
        "generated_rows": min(train.max_generate_samples, num_rows) if uses_texts else 0,
        "writing": GenerationOptions(
            train.max_new_tokens, train.num_beams, train.temperature, train.top_p, train.seed
        ),
        "score_texts": task.score_texts,
    }


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
    step_collator = run.hooks.collator(pad_id, fast.plan, run.objective) if fast else None
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
