"""The configuration in the words of `transformers.TrainingArguments`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.config.sections import TrainerConfig
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.fast.plan.liger import kernel_arguments
from ftlevel.training.plan.resolve import Plan

_LOGS_A_RUN = 20


def count_steps(config: TrainerConfig, rows: int) -> int:
    """Return how many optimizer steps a run over `rows` rows makes."""
    micro_steps = math.ceil(rows / config.per_device_train_batch_size / (config.num_processes or 1))
    an_epoch = max(math.ceil(micro_steps / config.gradient_accumulation_steps), 1)
    return config.max_steps or math.ceil(config.num_train_epochs * an_epoch)


def doubts(config: TrainerConfig, rows: int, validation_rows: int) -> list[str]:
    """Return what was asked for and will not come to pass in a run of this length."""
    steps, found = count_steps(config, rows), []
    if config.warmup_steps > max(steps, 1):
        reached = (steps - 1) / int(config.warmup_steps)
        found.append(
            f"--warmup-steps {config.warmup_steps:,g} is longer than the run of {steps:,} steps: "
            f"the learning rate ends at {reached:.0%} of its peak."
        )
    asked = {"--eval-steps": config.eval_steps, "train.eval_on_start": config.eval_on_start}
    if not validation_rows and any(asked.values()):
        name = next(name for name, value in asked.items() if value)
        found.append(
            f"{name}: there are no validation rows, so nothing is evaluated; "
            "--validation-split 0.05 holds some back."
        )
    return found


def build_arguments(config: TrainConfig, plan: Plan, checkpoints: Path) -> Any:
    """Return the `TrainingArguments` of a run.

    Args:
        config: the configuration.
        plan: the resolved facts.
        checkpoints: directory of the checkpoint-N directories.
    """
    from transformers import TrainingArguments

    train = config.train
    steps = count_steps(train, len(plan.data.train))
    evaluates = bool(plan.data.validation)
    rows, accumulated = train.per_device_train_batch_size, train.gradient_accumulation_steps
    if plan.fast.enabled:  # a batch is a whole step, which our trainer splits into micro-batches
        rows, accumulated = rows * accumulated, 1
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps or -1,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=eval_batch_size(train),
        gradient_accumulation_steps=accumulated,
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs=(
            {"use_reentrant": False} if train.gradient_checkpointing else None
        ),
        seed=train.seed,
        data_seed=train.seed,
        logging_strategy="steps",
        logging_steps=train.logging_steps or max(1, steps // _LOGS_A_RUN),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter shows a NaN loss as 0.0
        eval_strategy="no" if not evaluates else "steps" if train.eval_steps else "epoch",
        eval_steps=train.eval_steps,
        eval_on_start=evaluates and train.eval_on_start,
        save_strategy="steps" if train.save_steps else "no",
        save_steps=train.save_steps or 500,
        save_total_limit=None,  # checkpoints are rotated by us, once they are certified
        bf16=plan.dtype == "bfloat16",
        fp16=plan.dtype == "float16",
        use_cpu=plan.device == "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        # Every trained tensor gets a gradient in every step, which is checked at the first; and the
        # chunked cross-entropy does not go through the model's outputs, where DDP would look.
        ddp_find_unused_parameters=False,
        report_to=config.output.report_to,
        disable_tqdm=True,
        dataloader_pin_memory=plan.device == "cuda",
        **kernel_arguments(config, plan.device, plan.model_config.model_type),
    )


def eval_batch_size(train: TrainerConfig) -> int:
    """Return how many rows a forward pass of the evaluation takes."""
    return train.per_device_eval_batch_size or train.per_device_train_batch_size


def build_evaluator(config: TrainConfig, plan: Plan) -> Evaluator | None:
    """Return what scores the validation rows, or None if there are none."""
    if not plan.data.validation:
        return None
    wish = config.train.predict_with_generate
    generates = plan.task.generates if wish is None else wish and plan.task.writes_text
    rows = min(config.train.max_generate_samples, len(plan.data.validation))
    return Evaluator(
        rows=plan.data.validation,
        tokenizer=plan.tokenizer,
        kind=plan.kind,
        objective=plan.objective,
        device=plan.device,
        dtype=plan.dtype,
        batch_size=eval_batch_size(config.train),
        generated_rows=rows if generates else 0,
        max_new_tokens=config.train.max_new_tokens,
        score_texts=plan.task.score_texts,
        language=plan.data.facts["target_language"],
        chunked_cross_entropy=plan.fast.chunked_cross_entropy,
    )
