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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ftlevel.fast.likelihoods import base_model
from ftlevel.methods import METHODS
from ftlevel.models.hardware import DTYPES
from ftlevel.training.forecast.memory import BlockSample, StepMemory, get_peak
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
from ftlevel.training.model import get_cast_layers, replicated_parameters
from ftlevel.training.plan.run import Run

GATHERED, REDUCED = "gathered", "reduction"

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

    def stored(self, ranks: int) -> float:
        """Returns the bytes in the process that stores the most."""
        return self.times * self.size * -(-self.rows // ranks) / self.rows

    def gathered(self, ranks: int) -> float:
        """Returns the bytes of the gathered tensor, including padding."""
        return self.times * self.sent * ranks * -(-self.rows // ranks) / self.rows


Tensors = Sequence[ShardedTensor]
"""Tensors that FSDP2 shards and gathers together."""


def gathered_bytes(tensors: Tensors, ranks: int) -> float:
    """Returns the bytes of gathered `tensors`, including padding."""
    return sum(tensor.gathered(ranks) for tensor in tensors)


@dataclass(frozen=True)
class ShardedModel:
    """Sizes of the tensors that FSDP2 shards in a model.

    Attributes:
        shard: value of `--shard`.
        block: tensors in the largest block.
        blocks: tensors in all blocks.
        root: tensors outside the blocks: embeddings, head and others.
        root_casts: bytes of autocast copies of `root`; sharded blocks need none.
        trained: bytes of the float32 gradients of all trained parameters, sharded or not.
        trains_base: whether the sharded tensors are trained.
    """

    ranks: int
    shard: str
    block: Tensors
    blocks: Tensors
    root: Tensors
    root_casts: int
    trained: int
    trains_base: bool

    def estimate_rank(self, memory: StepMemory) -> StepMemory:
        """Returns an estimate for the rank that needs most; `memory` is the unsharded model's."""
        peaks = {moment: self._at(moment, parts) for moment, parts in memory.moments.items()}
        return get_peak(peaks, memory.tokens)

    def _at(self, moment: str, parts: Mapping[str, float]) -> dict[str, float]:
        parts, ranks = dict(parts), self.ranks
        if self.shard == "none":  # DDP's buckets are a second copy of the gradients
            parts[REDUCED] = parts.get(GRADIENTS, 0) or parts.get(ADAPTER, 0)
            return parts
        for part, saved in self.saved_bytes.items():
            ratio = 1 - saved / parts[part] if parts.get(part) else 1.0
            parts[part] = parts.get(part, 0) - saved
            if part == WEIGHTS and self.trains_base:
                for other in (GRADIENTS, OPTIMIZER):
                    parts[other] = parts.get(other, 0) * ratio
        if CASTS in parts:
            parts[CASTS] = min(parts[CASTS], self.root_casts)
        if moment != UPDATE:
            block, blocks = (gathered_bytes(group, ranks) for group in (self.block, self.blocks))
            blocks = blocks + block if self.shard == "grads" else 3 * block
            parts[GATHERED] = gathered_bytes(self.root, ranks) + blocks
            if self.trains_base and moment in (BACKWARD, FIRST_BLOCK):
                tensors = (*self.root, *self.block, *self.block)
                parts[REDUCED] = ranks * sum(tensor.stored(ranks) for tensor in tensors)
        elif not self.trains_base:
            parts[REDUCED] = self.trained
        return parts

    @property
    def saved_bytes(self) -> dict[str, float]:
        """Memory category → bytes by which sharding reduces the memory of a rank."""
        sizes: dict[str, float] = {}
        for tensor in (*self.blocks, *self.root) if self.shard != "none" else ():
            saved = tensor.stored(1) - tensor.stored(self.ranks)
            sizes[tensor.part] = sizes.get(tensor.part, 0) + saved
        return sizes


def get_sharded_model(run: Run, ranks: int) -> ShardedModel:
    """Returns the tensors that `ranks` GPUs shard by `--shard`, without loading the model."""
    sample, dtype = BlockSample.of(run), DTYPES[run.model.dtype]
    times = {**dict.fromkeys(sample.ends, 1), **sample.times}
    fake_model = create_fake_model(run, times)
    fake_model.close()
    model = fake_model.model
    replicated, base = replicated_parameters(model), base_model(model)
    blocks = {base.get_submodule(name): count for name, count in times.items()}
    casts = {
        linear.weight for block in blocks for linear in get_cast_layers(block, dtype, replicated)
    }

    def sizes(parameters: Iterable[torch.nn.Parameter], times: int = 1) -> list[ShardedTensor]:
        """Returns sizes of the sharded ones of `parameters`; `casts` are gathered in 16 bits."""
        return [
            ShardedTensor(
                times,
                WEIGHTS if p.is_floating_point() else QUANTIZED,
                p.shape[0],
                p.nbytes,
                p.numel() * dtype.itemsize if p in casts else p.nbytes,
            )
            for p in parameters
            if p not in replicated
        ]

    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    outside = [parameter for parameter in model.parameters() if parameter not in in_blocks]
    all_casts = {linear.weight for linear in get_cast_layers(model, dtype, replicated)}
    trained = sum(map(_num_trained, outside)) + sum(
        count * sum(map(_num_trained, block.parameters())) for block, count in blocks.items()
    )
    groups = [sizes(block.parameters()) for block in blocks]
    return ShardedModel(
        ranks=ranks,
        shard=run.config.train.shard,
        block=max(groups, key=lambda group: gathered_bytes(group, 1)),
        blocks=[
            tensor for block, count in blocks.items() for tensor in sizes(block.parameters(), count)
        ],
        root=sizes(outside),
        root_casts=dtype.itemsize * sum(weight.numel() for weight in all_casts - casts),
        trained=_FLOAT * trained,
        trains_base=METHODS[run.config.method.kind].trains_base(run.config.method),
    )


def _num_trained(parameter: torch.nn.Parameter) -> int:
    return parameter.numel() if parameter.requires_grad else 0
