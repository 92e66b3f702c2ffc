"""The configuration in the words of `transformers.TrainingArguments`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.config.trainer import TrainerConfig
from ftlevel.evaluation.metrics import generates_texts, wants_texts
from ftlevel.evaluation.scoring import Evaluator, Writing
from ftlevel.fast.plan.liger import kernel_arguments
from ftlevel.models.upstream.trainer import use_one_gpu
from ftlevel.training.plan.plan import Plan

_LOGS_A_RUN = 20


def build_arguments(config: TrainConfig, plan: Plan, checkpoints: Path) -> Any:
    """Return the `TrainingArguments` of a run.

    Args:
        config: the configuration.
        plan: the resolved facts.
        checkpoints: directory of the checkpoint-N directories.
    """
    from transformers import TrainingArguments

    train = config.train
    rows, accumulated = train.per_device_train_batch_size, train.gradient_accumulation_steps
    if plan.fast.enabled:  # a batch is a whole step, which our trainer splits into micro-batches
        rows, accumulated = rows * accumulated, 1
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps or -1,
        learning_rate=plan.schedule.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        lr_scheduler_kwargs=dict(train.lr_scheduler_kwargs),
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        label_smoothing_factor=train.label_smoothing_factor,
        neftune_noise_alpha=train.neftune_noise_alpha,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
        optim_args=",".join(f"{name}={value}" for name, value in train.optim_args.items()) or None,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulated,
        seed=train.seed,
        data_seed=train.order_seed,
        **_watching(train, plan),
        save_strategy=_save_strategy(train),
        save_steps=train.save_steps or 500,
        save_total_limit=None,  # checkpoints are rotated by us, once they are certified
        bf16=plan.model.dtype == "bfloat16",
        fp16=plan.model.dtype == "float16",
        use_cpu=plan.model.device == "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        # Every trained tensor gets a gradient in every step, which is checked at the first; and the
        # chunked cross-entropy does not go through the model's outputs, where DDP would look.
        ddp_find_unused_parameters=False,
        report_to="none",  # trackers are told by us: `training/callbacks/trackers.py`
        disable_tqdm=True,
        # What a GPU reads is copied while it computes what came before.
        dataloader_pin_memory=plan.model.device == "cuda",
        accelerator_config={"non_blocking": plan.model.device == "cuda"},
        **kernel_arguments(config, plan.model.device, plan.model.family),
    )
    use_one_gpu(arguments)
    return arguments


def _save_strategy(train: TrainerConfig) -> str:
    """Return Trainer's: at the best evaluation, and by the clock, callbacks tell it when."""
    if train.save_strategy == "best":
        return "no"
    return train.save_strategy or ("steps" if train.save_steps else "no")


def _watching(train: TrainerConfig, plan: Plan) -> dict[str, Any]:
    """Return when a run is logged and evaluated, which changes nothing that it computes."""
    evaluates = bool(plan.data.validation)
    strategy = train.eval_strategy or ("steps" if train.eval_steps else "epoch")
    return {
        "logging_strategy": "steps",
        "logging_steps": train.logging_steps or max(1, plan.schedule.steps // _LOGS_A_RUN),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # the filter shows a NaN loss as 0.0
        "eval_strategy": strategy if evaluates else "no",
        "eval_steps": train.eval_steps,
        "eval_on_start": evaluates and train.eval_on_start,
        "per_device_eval_batch_size": eval_batch_size(train),
    }


def eval_batch_size(train: TrainerConfig) -> int:
    """Return how many rows a forward pass of the evaluation takes."""
    return train.per_device_eval_batch_size or train.per_device_train_batch_size


def writing_of(train: TrainerConfig) -> Writing:
    """Return how the evaluation of a run writes."""
    return Writing(
        train.max_new_tokens, train.num_beams, train.temperature, train.top_p, train.seed
    )


def build_evaluator(config: TrainConfig, plan: Plan) -> Evaluator | None:
    """Return what scores the validation rows, or None if there are none."""
    if not plan.data.validation:
        return None
    generates = generates_texts(config.train.predict_with_generate, plan.task) and wants_texts(
        config.train.metrics, plan.task
    )
    rows = min(config.train.max_generate_samples, len(plan.data.validation))
    return Evaluator(
        rows=plan.data.validation,
        tokenizer=plan.model.tokenizer,
        kind=plan.model.kind,
        objective=plan.objective,
        device=plan.model.device,
        dtype=plan.model.dtype,
        batch_size=eval_batch_size(config.train),
        generated_rows=rows if generates else 0,
        writing=writing_of(config.train),
        score_texts=plan.task.score_texts,
        language=plan.data.facts["target_language"],
        chunked_cross_entropy=plan.fast.chunked_cross_entropy,
        metrics=config.train.metrics,
    )
