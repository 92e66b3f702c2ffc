"""The model of a run: its weights, its method on it, and what that may begin from."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ftlevel.config import QuantConfig, TrainConfig
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.events import Listener
from ftlevel.fast.plan.fused_lora import uses_fused_layers
from ftlevel.fast.step import FastStep
from ftlevel.methods import METHODS
from ftlevel.methods.base import StartInputs
from ftlevel.models.hardware import DTYPES
from ftlevel.models.loading import check_missing, load_model
from ftlevel.models.quantization import build_quantization_config
from ftlevel.trained.adapt import apply_method, begin_from, copy_start, train_in_float32
from ftlevel.training.digest import Digest, base_name, digest_tensors
from ftlevel.training.fast_step import speed_up
from ftlevel.training.memory.allocator import use_expandable_segments
from ftlevel.training.memory.checkpointing import set_checkpointing
from ftlevel.training.memory.shards import shard
from ftlevel.training.plan.plan import Plan, PlannedModel


@dataclass(frozen=True)
class Adapted:
    """A model that is ready to be trained.

    Attributes:
        model: the base with the method on it.
        start: how it began, where that is lost in training.
        fast: the fast step that is on it, if any.
        digests: of the base's tensors as they were loaded, by their names in it.
    """

    model: Any
    start: dict[str, Any]
    fast: FastStep | None
    digests: Mapping[str, Digest]


def load_adapted(config: TrainConfig, plan: Plan, listener: Listener) -> Adapted:
    """Load the base, put the method onto it and the fast step onto both."""
    use_expandable_segments(plan.model.device)
    fused = uses_fused_layers(config, plan.model.device)
    shards = config.train.shard != "none"
    here = replace(plan, model=held_by_host(plan.model)) if shards else plan
    base = load_base(config, here.model)
    is_whole = METHODS[config.method.kind].build is None  # its own weights are what is trained
    digests = {} if is_whole or shards else digest_tensors(base.named_parameters())
    model = apply_method(base, config.method, plan.base, fused=fused)
    if plan.adapter is None:
        prepare_start(model, config, here)
    else:
        begin_from(model, plan.adapter.directory)
    if shards:
        shard(model, plan.model.device, holds=config.train.shard == "grads")
    if is_whole or shards:  # of what this process holds
        digests = digest_tensors(
            (base_name(n), p) for n, p in model.named_parameters() if not p.requires_grad
        )
    fast = speed_up(model, plan, listener)
    if choices := set_checkpointing(model, config, plan):
        listener.choices("train", choices)
    return Adapted(model, copy_start(model, config.method), fast, digests)


def held_by_host(planned: PlannedModel) -> PlannedModel:
    """Return where the base is loaded to be shared out: what is quantized is so on its device."""
    return planned if planned.quant.kind != "none" else replace(planned, device="cpu")


def load_base(config: TrainConfig, planned: PlannedModel) -> Any:
    """Load the base model for training; new heads are drawn from the seed.

    Raises:
        InputError: its weights are damaged, or it lacks some.
    """
    from transformers import set_seed

    set_seed(config.train.seed)
    whole = METHODS[config.method.kind].build is None
    compute = DTYPES[planned.dtype]
    model, missing = load_model(
        planned.source,
        planned.config,
        planned.auto_class,
        dtype=DTYPES["float32"] if whole else compute,
        device=planned.device,
        quantization=build_quantization_config(planned.quant, compute, planned.heads),
        attn_implementation=config.model.attn_implementation,
    )
    check_missing(missing, planned.new_modules, planned.source.words)
    return model


def prepare_start(model: Any, config: TrainConfig, plan: Plan) -> None:
    """Let the method begin where it does, which may need rows or the float weights (mutated)."""
    start = METHODS[config.method.kind].start
    if start is None:
        return
    size, seed = config.train.per_device_train_batch_size, config.train.seed
    pad_id, device = plan.model.pad_id, plan.model.device
    inputs = StartInputs(
        batches=lambda: ShuffledBatches(plan.data.train, pad_id, size, seed, device),
        float_weights=lambda: float_weights(config, plan.model),
        device=device,
        dtype=plan.model.dtype,
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


def float_weights(config: TrainConfig, planned: PlannedModel) -> Callable[[str], torch.Tensor]:
    """Return the way from a linear's name to its weight (out, in) before quantization."""
    base = load_base(config, replace(planned, device="cpu", quant=QuantConfig()))

    def weight_of(name: str) -> torch.Tensor:
        linear = base.get_submodule(name)
        weight: torch.Tensor = linear.weight
        return weight if isinstance(linear, torch.nn.Linear) else weight.T  # GPT-2's Conv1D

    return weight_of
