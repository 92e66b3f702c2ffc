"""Which blocks are recomputed in the backward pass, and where what they begin with is held.

    k = ⌈(T · L · a − M) / (T · (a − s))⌉   of L blocks

for T tokens of a micro-batch, a bytes that the autograd graph of a block holds of each, of which s
are its input, and M bytes of memory that are free for them. Nothing of this is guessed from a
config: a is counted as the model computes a few tokens, with the method and the fast step on it.
The first blocks are recomputed, whose activations would be held the longest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.data.encoding.collate import Collator
from ftlevel.fast.head.loss import base_model
from ftlevel.models.hardware import autocast, free_memory_bytes
from ftlevel.models.module_tree import find_blocks
from ftlevel.training.plan.plan import Plan

TRIED_TOKENS = 64
"""Tokens of the row that a block's activations are counted on."""

FREE_SHARE = 0.8
"""Of the free memory, what activations may take: the rest is for the head's scores, gradients, the
block that is computed, and what the allocator loses to fragments."""


@dataclass(frozen=True)
class Activations:
    """What the autograd graph holds of each token.

    Attributes:
        block: bytes of a block, the mean over all.
        states: bytes of what a block begins with, which is held of one that is recomputed.
        blocks: how many there are.
    """

    block: float
    states: float
    blocks: int

    def count_recomputed(self, tokens: int, memory: int) -> int:
        """Return how many blocks are to be recomputed for `tokens` to fit into `memory` bytes."""
        over = tokens * self.blocks * self.block - memory
        saved = tokens * (self.block - self.states)
        return 0 if over <= 0 else min(self.blocks, math.ceil(over / saved))


def set_checkpointing(model: Any, config: TrainConfig, plan: Plan) -> list[Choice]:
    """Have as many blocks of `model` (mutated) recomputed as is asked for, or as its memory asks.

    Args:
        model: with its method and the fast step on it.
        config: the whole configuration.
        plan: of the run.

    Returns:
        The line of the screen; none where nothing is recomputed.
    """
    train, base = config.train, base_model(model)
    if train.recomputes:
        _enable(base, offload=train.offload_activations)
        where = "; what they begin with is in the host's memory" * train.offload_activations
        return [Choice("recomputed blocks", "all", f"as asked{where}")]
    blocks = find_blocks(base)
    if not train.may_recompute(plan.model.device) or not _has_single_switches(base, blocks):
        return []
    found = count_activations(model, blocks, plan)
    tokens = plan.fast.tokens
    if not plan.fast.enabled:
        tokens = train.per_device_train_batch_size * plan.data.max_length
    memory = int(FREE_SHARE * free_memory_bytes(plan.model.device))
    count = found.count_recomputed(tokens, memory)
    if not count:
        return []
    _enable(base)
    recompute_first(blocks, count)
    why = (
        f"auto: {tokens:,} tokens hold {tokens * found.blocks * found.block / 1e9:.1f} GB, and "
        f"{memory / 1e9:.1f} GB are free for them"
    )
    return [Choice("recomputed blocks", f"{count} of {len(blocks)}", why)]


def _enable(base: Any, *, offload: bool = False) -> None:
    base.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)


def _has_single_switches(base: Any, blocks: Sequence[nn.Module]) -> bool:
    """Whether transformers recomputes each block of `base` by a switch of its own."""
    return bool(
        base.supports_gradient_checkpointing
        and blocks
        and all(hasattr(block, "gradient_checkpointing") for block in blocks)
    )


def recompute_first(blocks: Sequence[nn.Module], count: int) -> None:
    """Let the first `count` of `blocks` (mutated), all of which are recomputed, alone stay so."""
    for block in blocks[count:]:
        block.gradient_checkpointing = False  # type: ignore[assignment]


def count_activations(model: Any, blocks: Sequence[nn.Module], plan: Plan) -> Activations:
    """Return what a token takes, counted as `model` computes the beginning of a row."""
    longest = max(plan.data.train[:100], key=lambda row: len(row.input_ids))
    extras = {name: values[:TRIED_TOKENS] for name, values in longest.extras.items()}
    row = replace(longest, input_ids=longest.input_ids[:TRIED_TOKENS], labels=0, extras=extras)
    batch = Collator(plan.model.pad_id)([row])
    del batch["labels"]
    tokens, device = batch["input_ids"].numel(), plan.model.device
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}
    states: list[int] = []
    inside = [False]

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001 - a hook
        inside[0] = True
        states.append((args[0] if args else kwargs["hidden_states"]).nbytes)

    def leave(block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - a hook
        inside[0] = False

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if inside[0] and storage.data_ptr() not in weights and tensor.numel() >= tokens:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(leave))
    training = model.training
    model.train()
    try:
        with (
            torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []),
            autocast(device, plan.model.dtype),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            outputs = model(**{name: value.to(device) for name, value in batch.items()})
            del outputs  # only now does the graph let go of what was counted
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return Activations(sum(held.values()) / len(blocks) / tokens, states[0] / tokens, len(blocks))
