"""The base of a run: what a method is told of it, its weights, and what it may begin from."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ftlevel.config import QuantConfig, TrainConfig
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.methods import METHODS, Base
from ftlevel.methods.base import StartInputs
from ftlevel.models.hardware import DTYPES
from ftlevel.models.loading import check_missing, load_model
from ftlevel.models.quantization import build_quantization_config
from ftlevel.trained.adapt import train_in_float32
from ftlevel.training.arguments import count_steps
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
    whole = METHODS[config.method.kind].build is None
    dtype = DTYPES["float32" if whole else plan.dtype]
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
    """Let the method begin where it does, which may need rows or the float weights (mutated)."""
    start = METHODS[config.method.kind].start
    if start is None:
        return
    size, seed = config.train.per_device_train_batch_size, config.train.seed
    pad_id = plan.tokenizer.pad_token_id
    inputs = StartInputs(
        batches=lambda: ShuffledBatches(plan.data.train, pad_id, size, seed, plan.device),
        float_weights=lambda: float_weights(config, plan),
        device=plan.device,
        dtype=plan.dtype,
    )
    start.begin(model, config.method, inputs)
    train_in_float32(model)


class ShuffledBatches:
    """The rows in one random order, collated; begins anew whenever it is gone through.

    A batch has a mask `supervised` of its tokens that are real and, in generation, learned.
    """

    def __init__(
        self, rows: Sequence[Encoded], pad_id: int, size: int, seed: int, device: str
    ) -> None:
        self.rows = list(rows)
        random.Random(seed).shuffle(self.rows)
        self.size, self.device = size, device
        self.collate = Collator(pad_id)

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(self.rows), self.size):
            batch = self.collate(self.rows[start : start + self.size])
            batch = {name: value.to(self.device) for name, value in batch.items()}
            mask, labels = batch["attention_mask"].bool(), batch.get("labels")
            if labels is not None and labels.shape == mask.shape:
                mask &= labels != IGNORED
            yield {**batch, "supervised": mask}


def float_weights(config: TrainConfig, plan: Plan) -> Callable[[str], torch.Tensor]:
    """Return the way from a linear's name to its weight (out, in) before quantization."""
    base = load_base(config, replace(plan, device="cpu", quant=QuantConfig()))

    def weight_of(name: str) -> torch.Tensor:
        linear = base.get_submodule(name)
        weight: torch.Tensor = linear.weight
        return weight if isinstance(linear, torch.nn.Linear) else weight.T  # GPT-2's Conv1D

    return weight_of
