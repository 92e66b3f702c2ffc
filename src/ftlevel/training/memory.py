"""Which blocks are recomputed in the backward pass, and where what they begin with is held.

    k = min {k : T · (Σ_i a_i − Σ_{i < k} (a_i − s_i)) ≤ M}   of all blocks

for T tokens of a micro-batch, a_i bytes that the autograd graph of block i holds of each, of which
s_i are its input, and M bytes of memory that are free for them. Nothing of this is guessed from a
config: a_i is counted as the model computes a row, with the method and the fast step on it. The
first blocks are recomputed, whose activations would be held the longest; of two stacks those of
the encoder, whose tokens are the ones that are counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.data.encoding.collate import Collator
from ftlevel.fast.head.loss import base_model
from ftlevel.fast.layers.fused_lora import skip_unneeded_products
from ftlevel.models.hardware import autocast, free_memory_bytes
from ftlevel.models.module_tree import find_stacks
from ftlevel.models.upstream.fake import storage_of
from ftlevel.training.plan.plan import Plan

TRIED_TOKENS = 64
"""Tokens of the row that a block's activations are counted on; where attention holds its scores, as
that of two stacks does, they grow with the square of a row, and the whole longest row is tried."""

_SAMPLED_ROWS = 100

FREE_SHARE = 0.8
"""Of the free memory, what activations may take: the rest is for the head's scores, gradients, the
block that is computed, and what the allocator loses to fragments."""


@dataclass(frozen=True)
class Activations:
    """What the autograd graph holds of each token, block by block.

    Attributes:
        held: bytes of each block.
        states: bytes of what each begins with, which are held of one that is recomputed.
    """

    held: tuple[float, ...]
    states: tuple[float, ...]

    def count_recomputed(self, tokens: int, memory: int) -> int:
        """Return how many blocks are to be recomputed for `tokens` to fit into `memory` bytes."""
        saved = [held - states for held, states in zip(self.held, self.states, strict=True)]
        left = accumulate(saved, lambda rest, more: rest - more, initial=sum(self.held))
        fits = (count for count, rest in enumerate(left) if tokens * rest <= memory)
        return next(fits, len(self.held))


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
        recompute_blocks(base, offload=train.offload_activations)
        where = "; what they begin with is in the host's memory" * train.offload_activations
        return [Choice("recomputed blocks", "all", f"as asked{where}")]
    blocks = list(chain(*find_stacks(base)))
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
    recompute_blocks(base)
    recompute_first(blocks, count)
    why = (
        f"auto: {tokens:,} tokens hold {tokens * sum(found.held) / 1e9:.1f} GB, and "
        f"{memory / 1e9:.1f} GB are free for them"
    )
    return [Choice("recomputed blocks", f"{count} of {len(blocks)}", why)]


def recompute_blocks(base: Any, *, offload: bool = False) -> None:
    """Have the blocks of `base` (mutated) recomputed by transformers' switch.

    Args:
        base: a model of transformers.
        offload: whether what they begin with is held in the host's memory.
    """
    base.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)
    skip_unneeded_products(list(chain(*find_stacks(base))))


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
    """Return what a token takes, counted as `model` computes a row, or the beginning of one."""
    batch, device = _trial(plan), plan.model.device
    tokens = batch["input_ids"].numel()
    weights = {storage_of(p) for p in model.parameters()}
    held: dict[Any, tuple[int, int]] = {}
    training = model.training
    model.train()
    try:
        with _told_of_blocks(blocks) as told:

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = storage_of(tensor)
                if told.at is not None and storage not in weights and tensor.numel() >= told.least:
                    held.setdefault(storage, (told.at, tensor.untyped_storage().nbytes()))
                return tensor

            with (
                torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []),
                autocast(device, plan.model.dtype),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                outputs = model(**{name: value.to(device) for name, value in batch.items()})
                del outputs  # only now does the graph let go of what was counted
    finally:
        model.train(training)
    sums = [0] * len(blocks)
    for block, size in held.values():
        sums[block] += size
    return Activations(tuple(size / tokens for size in sums),
                       tuple(told.states[at] / tokens for at in range(len(blocks))))  # fmt: skip


def _trial(plan: Plan) -> dict[str, Any]:
    """Return the batch of one row that is tried: of one stack a piece, of two with its answer."""
    rows = plan.data.train[:_SAMPLED_ROWS]
    row = max(rows, key=lambda row: len(row.input_ids))
    if plan.model.kind == "encoder-decoder" and isinstance(row.labels, list):
        answered = sum(len(r.labels) for r in rows if isinstance(r.labels, list))
        share = answered / sum(len(r.input_ids) for r in rows)
        answer = max(1, round(share * len(row.input_ids)))
        labels = (row.labels * answer)[:answer]  # any that are there: their number counts
        return Collator(plan.model.pad_id)([replace(row, labels=labels)])
    extras = {name: values[:TRIED_TOKENS] for name, values in row.extras.items()}
    row = replace(row, input_ids=row.input_ids[:TRIED_TOKENS], labels=0, extras=extras)
    batch = Collator(plan.model.pad_id)([row])
    del batch["labels"]
    return batch


class _Told:
    """Where a forward pass is.

    Attributes:
        at: the block that is computed; None between two stacks.
        least: numbers of a tensor that has some of each token.
        states: block → bytes that it began with.
    """

    def __init__(self) -> None:
        self.at: int | None = None
        self.least = 0
        self.states: dict[int, int] = {}


@contextlib.contextmanager
def _told_of_blocks(blocks: Sequence[nn.Module]) -> Iterator[_Told]:
    """Give what knows, inside the block, which of `blocks` is computed."""
    told = _Told()
    places = {block: at for at, block in enumerate(blocks)}

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        told.at, told.least = places[block], states.shape[:-1].numel()
        told.states[places[block]] = states.nbytes

    def leave(block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - a hook
        told.at = None

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        yield told
    finally:
        for hook in hooks:
            hook.remove()
