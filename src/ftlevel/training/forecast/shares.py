"""Memory of one rank under FSDP2 or DDP.

FSDP2 shards each tensor along the first dimension. Of R rows, the first of n ranks stores ⌈R / n⌉;
an all-gather moves n · ⌈R / n⌉, in compute precision for linear layers of `--method full`. A block
is gathered while the previous one computes, so a rank stores

    shards    its part of every sharded tensor, and all tensors that are not sharded
    gathered  embeddings and head; a block, the next one and the receive buffer
              (`--shard grads`: all blocks, until their backward pass)
    reduced   `--method full`: unreduced gradients of two blocks, embeddings and head;
              otherwise the adapter's gradients once more, in one buffer, at the end
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ftlevel.methods import METHODS
from ftlevel.models.hardware import DTYPES
from ftlevel.training.forecast.memory import LayerSample, StepMemory, get_peak
from ftlevel.training.forecast.meta_model import (
    ADAPTER,
    BACKWARD,
    CASTS,
    FIRST_BLOCK,
    GRADIENTS,
    OPTIMIZER,
    QUANTIZED,
    UPDATE,
    WEIGHTS,
    create_fake_model,
)
from ftlevel.training.model import blocks_of, get_cast_layers, replicated_parameters
from ftlevel.training.plan.run import Run

GATHERED, REDUCED = "gathered", "reduction"

_CODES = (torch.uint8, torch.int8)
_FLOAT = 4  # bytes: gradients are averaged in float32


@dataclass(frozen=True)
class ShardedTensor:
    """Size of a tensor that FSDP2 shards; the model has `times` tensors of this size.

    Attributes:
        part: category in the memory estimate.
        rows: size of the first dimension.
        size: bytes of the whole tensor.
        sent: bytes when gathered, possibly in a narrower dtype.
    """

    times: int
    part: str
    rows: int
    size: int
    sent: int


@dataclass(frozen=True)
class ShardGroup:
    """Sizes of tensors that FSDP2 shards and gathers together."""

    tensors: tuple[ShardedTensor, ...]

    def stored_bytes(self, world_size: int) -> dict[str, float]:
        """Returns memory category → bytes in the process that stores the most."""
        sizes: dict[str, float] = {}
        for tensor in self.tensors:
            ratio = -(-tensor.rows // world_size) / tensor.rows
            sizes[tensor.part] = sizes.get(tensor.part, 0) + tensor.times * tensor.size * ratio
        return sizes

    def gathered_bytes(self, world_size: int) -> float:
        """Returns the bytes of the gathered tensors, including padding."""
        rows = ((tensor, world_size * -(-tensor.rows // world_size)) for tensor in self.tensors)
        return sum(tensor.times * tensor.sent * count / tensor.rows for tensor, count in rows)

    def reduced_bytes(self, world_size: int) -> float:
        """Returns the bytes of a rank's gradients before they are reduced, including padding."""
        return world_size * sum(self.stored_bytes(world_size).values())


@dataclass(frozen=True)
class ShardedModel:
    """Sizes of the tensors that FSDP2 shards in a model.

    Attributes:
        block: tensors in the largest block.
        blocks: tensors in all blocks.
        root: tensors outside the blocks: embeddings, head and others.
        root_casts: bytes of autocast copies of `root`; sharded blocks need none.
        trained: bytes of the float32 gradients of all trained parameters, sharded or not.
        trains_base: whether the sharded tensors are trained.
    """

    block: ShardGroup
    blocks: ShardGroup
    root: ShardGroup
    root_casts: int
    trained: int
    trains_base: bool

    def estimate_rank(self, memory: StepMemory, world_size: int, shard: str) -> StepMemory:
        """Returns an estimate for the rank that needs most; `memory` is the unsharded model's."""
        return get_peak(
            {
                moment: self._at(moment, parts, world_size, shard)
                for moment, parts in memory.moments.items()
            },
            memory.tokens,
        )

    def _at(
        self, moment: str, parts: Mapping[str, float], world_size: int, shard: str
    ) -> dict[str, float]:
        parts = dict(parts)
        if shard == "none":  # DDP's buckets are a second copy of the gradients
            parts[REDUCED] = parts.get(GRADIENTS, 0) or parts.get(ADAPTER, 0)
            return parts
        for part, saved in self.saved_bytes(world_size).items():
            ratio = 1 - saved / parts[part] if parts.get(part) else 1.0
            parts[part] = parts.get(part, 0) - saved
            if part == WEIGHTS and self.trains_base:
                for other in (GRADIENTS, OPTIMIZER):
                    parts[other] = parts.get(other, 0) * ratio
        if CASTS in parts:
            parts[CASTS] = min(parts[CASTS], self.root_casts)
        is_update = moment == UPDATE
        if not is_update:
            root, block = (
                self.root.gathered_bytes(world_size),
                self.block.gathered_bytes(world_size),
            )
            gathered = (
                self.blocks.gathered_bytes(world_size) + block if shard == "grads" else 3 * block
            )
            parts[GATHERED] = root + gathered
            if self.trains_base and moment in (BACKWARD, FIRST_BLOCK):
                parts[REDUCED] = self.root.reduced_bytes(world_size) + 2 * self.block.reduced_bytes(
                    world_size
                )
        elif not self.trains_base:
            parts[REDUCED] = self.trained
        return parts

    def saved_bytes(self, world_size: int) -> dict[str, float]:
        """Returns memory category → bytes by which sharding reduces the memory of a rank."""
        sizes: dict[str, float] = {}
        for group in (self.blocks, self.root):
            total, stored = group.stored_bytes(1), group.stored_bytes(world_size)
            for part, size in total.items():
                sizes[part] = sizes.get(part, 0) + size - stored[part]
        return sizes


def get_sharded_model(run: Run) -> ShardedModel:
    """Returns the sizes of the tensors that `--shard` shards, without loading the model."""
    sample = LayerSample.of(run).sample
    fake_model = create_fake_model(run, None if sample is None else list(sample))
    fake_model.close()
    model = fake_model.model
    replicated, blocks = replicated_parameters(model), blocks_of(model)
    dtype = DTYPES[run.model.dtype]
    cast_weights = {
        linear.weight for block in blocks for linear in get_cast_layers(block, dtype, replicated)
    }
    groups = [
        _create_group(block.parameters(), replicated, cast_weights, dtype) for block in blocks
    ]
    block_parameters = {parameter for block in blocks for parameter in block.parameters()}
    tensors = [tensor for cut in groups for tensor in cut.tensors]
    trained = _num_trained(model)
    if sample is not None:  # each sampled layer represents similar ones
        for at, times in zip(range(len(blocks)), itertools.cycle(sample.values()), strict=False):
            if extra := round(times) - 1:
                tensors += [replace(tensor, times=extra) for tensor in groups[at].tensors]
                trained += extra * _num_trained(blocks[at])
    return ShardedModel(
        block=max(groups, key=lambda cut: cut.gathered_bytes(1)),
        blocks=ShardGroup(tuple(tensors)),
        root=_create_group(
            (p for p in model.parameters() if p not in block_parameters), replicated, set(), dtype
        ),
        root_casts=dtype.itemsize
        * sum(
            linear.weight.numel()
            for linear in get_cast_layers(model, dtype, replicated)
            if linear.weight not in cast_weights
        ),
        trained=_FLOAT * trained,
        trains_base=METHODS[run.config.method.kind].trains_base(run.config.method),
    )


def _num_trained(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _create_group(
    parameters: Iterable[torch.nn.Parameter],
    replicated: set[torch.nn.Parameter],
    cast_weights: set[torch.nn.Parameter],
    dtype: torch.dtype,
) -> ShardGroup:
    """Returns sizes of `parameters` not in `replicated`; `cast_weights` are gathered in `dtype`."""
    return ShardGroup(
        tuple(
            ShardedTensor(
                1,
                QUANTIZED if p.dtype in _CODES else WEIGHTS,
                p.shape[0],
                p.nbytes,
                p.numel() * dtype.itemsize if p in cast_weights else p.nbytes,
            )
            for p in parameters
            if p not in replicated
        )
    )
