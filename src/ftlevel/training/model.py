"""The base of a run: what a method is told of it, its weights, and where LoRA starts in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ftlevel.config import LoraSpec, QuantConfig, TrainConfig
from ftlevel.methods import Base
from ftlevel.methods.lora.loftq import start_from_residual
from ftlevel.models.hardware import DTYPES
from ftlevel.models.loading import check_missing, load_model
from ftlevel.models.quantization import build_quantization_config
from ftlevel.trained.adapt import train_in_float32
from ftlevel.training.arguments import count_steps
from ftlevel.training.eva import start_from_data
from ftlevel.training.plan.resolve import Plan


def base_of(config: TrainConfig, plan: Plan) -> Base:
    """Return what a method must know of the model that it is put onto."""
    return Base(
        config=plan.model_config,
        kind=plan.kind,
        task_type=plan.task.peft_types.get(plan.kind),
        targets=plan.targets,
        heads=plan.heads,
        fan_in_fan_out=plan.fan_in_fan_out,
        total_steps=count_steps(config.train, len(plan.data.train)),
        tokenizer=plan.tokenizer,
        parameters=plan.parameters,
    )


def load_base(config: TrainConfig, plan: Plan) -> Any:
    """Load the base model of `plan` for training; new heads are drawn from the seed.

    Raises:
        InputError: its weights are damaged, or it lacks some.
    """
    from transformers import set_seed

    set_seed(config.train.seed)
    full = config.method.kind == "full"
    dtype = DTYPES["float32" if full else plan.dtype]
    model, missing = load_model(
        plan.source,
        plan.model_config,
        plan.auto_class,
        dtype=dtype,
        device=plan.device,
        quantization=build_quantization_config(plan.quant, DTYPES[plan.dtype], plan.heads),
        attn_implementation=config.model.attn_implementation,
    )
    check_missing(missing, plan.new_modules, plan.source.words)
    return model


def prepare_start(model: Any, config: TrainConfig, plan: Plan) -> None:
    """Give LoRA its start from the training rows (eva) or from the float weights (loftq; mutated).

    For loftq the float model is held beside the quantized one until its start is set.
    """
    init = config.method.init_lora_weights if isinstance(config.method, LoraSpec) else "default"
    if init == "loftq":
        start_from_residual(model, float_weights(config, plan))
    if init != "eva":
        return
    start_from_data(
        model,
        plan.data.train,
        pad_id=plan.tokenizer.pad_token_id,
        batch_size=config.train.per_device_train_batch_size,
        seed=config.train.seed,
        device=plan.device,
        dtype=plan.dtype,
    )
    train_in_float32(model)


def float_weights(config: TrainConfig, plan: Plan) -> Callable[[str], torch.Tensor]:
    """Return the way from a linear's name to its weight (out, in) before quantization."""
    base = load_base(config, replace(plan, device="cpu", quant=QuantConfig()))

    def weight_of(name: str) -> torch.Tensor:
        linear = base.get_submodule(name)
        weight: torch.Tensor = linear.weight
        return weight if isinstance(linear, torch.nn.Linear) else weight.T  # GPT-2's Conv1D

    return weight_of
