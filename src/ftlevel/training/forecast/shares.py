"""What one of several processes holds of a model that is shared out, and what it gathers.

FSDP2 cuts each tensor along its first axis: of R rows the first of n processes holds ⌈R / n⌉, and
n · ⌈R / n⌉ are gathered; of `--method full` linears in the precision that computes. A block is
gathered while the one before it computes, so a process has

    held      all parts, all that is whole
    gathered  embeddings and head; a block, the next one, and the buffer that it came in
              (`--shard grads`: all blocks, which wait for their backward pass)
    reduced   `--method full`: gradients of two blocks and of embeddings and head, before their
              reduction; else the gradients of the adapter once more, in one piece, at the end
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ftlevel.config import TrainConfig
from ftlevel.methods import METHODS
from ftlevel.models.hardware import DTYPES
from ftlevel.training.forecast.memory import Layers, MemoryForecast, highest
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
    build_fake_model,
)
from ftlevel.training.plan.plan import Plan
from ftlevel.training.shards import blocks_of, cast_linears, kept_whole

GATHERED, REDUCED = "gathered", "reduction"

_CODES = (torch.uint8, torch.int8)
_FLOAT = 4  # bytes: gradients are averaged in float32


@dataclass(frozen=True)
class Piece:
    """A tensor that is shared out.

    Attributes:
        times: how often it is there.
        part: of the forecast.
        rows: of it.
        size: bytes of it.
        sent: bytes of it as it is gathered, which may be in fewer bits.
    """

    times: int
    part: str
    rows: int
    size: int
    sent: int


@dataclass(frozen=True)
class Cut:
    """Tensors that are shared out together.

    Attributes:
        tensors: each of them.
    """

    tensors: tuple[Piece, ...]

    def held(self, ranks: int) -> dict[str, float]:
        """Return part → bytes of the process that holds most."""
        found: dict[str, float] = {}
        for one in self.tensors:
            share = -(-one.rows // ranks) / one.rows
            found[one.part] = found.get(one.part, 0) + one.times * one.size * share
        return found

    def gathered(self, ranks: int) -> float:
        """Return the bytes of all that the processes send."""
        rows = ((one, ranks * -(-one.rows // ranks)) for one in self.tensors)
        return sum(one.times * one.sent * count / one.rows for one, count in rows)

    def reduced(self, ranks: int) -> float:
        """Return the bytes of the gradients of all that the processes hold."""
        return ranks * sum(self.held(ranks).values())


@dataclass(frozen=True)
class Shares:
    """A model that is shared out.

    Attributes:
        block: the tensors of the largest block.
        blocks: all of them.
        count: how many blocks.
        root: embeddings, head and what else is outside.
        root_casts: bytes of what autocast makes of it: of blocks, nothing is left to be cast.
        trained: bytes of the gradients of what is trained and whole.
        trains_base: whether what is shared out is trained.
    """

    block: Cut
    blocks: Cut
    count: int
    root: Cut
    root_casts: int
    trained: int
    trains_base: bool

    def of_a_rank(self, found: MemoryForecast, ranks: int, way: str) -> MemoryForecast:
        """Return `found`, of a process with the whole model, for the largest of `ranks`.

        Args:
            found: with the peak of each moment.
            ranks: processes.
            way: of `--shard`.
        """
        return highest(
            {moment: self._at(moment, parts, ranks, way)
             for moment, parts in found.moments.items()},
            found.tokens,
        )  # fmt: skip

    def _at(
        self, moment: str, parts: Mapping[str, float], ranks: int, way: str
    ) -> dict[str, float]:
        parts = dict(parts)
        if way == "none":  # gradients a second time, in DDP's buckets
            parts[REDUCED] = parts.get(GRADIENTS, 0) or parts.get(ADAPTER, 0)
            return parts
        for part, saved in self.saved(ranks).items():
            left = 1 - saved / parts[part] if parts.get(part) else 1.0
            parts[part] = parts.get(part, 0) - saved
            if part == WEIGHTS and self.trains_base:
                for other in (GRADIENTS, OPTIMIZER):
                    parts[other] = parts.get(other, 0) * left
        if CASTS in parts:
            parts[CASTS] = min(parts[CASTS], self.root_casts)
        ends = moment == UPDATE
        if not ends:
            root, block = self.root.gathered(ranks), self.block.gathered(ranks)
            held = self.blocks.gathered(ranks) + block if way == "grads" else 3 * block
            parts[GATHERED] = root + held
            if self.trains_base and moment in (BACKWARD, FIRST_BLOCK):
                parts[REDUCED] = self.root.reduced(ranks) + 2 * self.block.reduced(ranks)
        elif not self.trains_base:
            parts[REDUCED] = self.trained
        return parts

    def saved(self, ranks: int) -> dict[str, float]:
        """Return part → bytes that a process does not hold."""
        found: dict[str, float] = {}
        for cut in (self.blocks, self.root):
            whole, held = cut.held(1), cut.held(ranks)
            for part, size in whole.items():
                found[part] = found.get(part, 0) + size - held[part]
        return found


def describe_shares(config: TrainConfig, plan: Plan) -> Shares:
    """Return how the model that `plan` trains is shared out, of tensors without numbers."""
    sample = Layers.of(plan).sample
    model = build_fake_model(config, plan, None if sample is None else list(sample)).model
    whole, blocks = kept_whole(model), blocks_of(model)
    dtype = DTYPES[plan.model.dtype]
    narrow = {linear.weight for block in blocks for linear in cast_linears(block, dtype, whole)}
    cuts = [_cut(block.parameters(), whole, narrow, dtype) for block in blocks]
    inside = {parameter for block in blocks for parameter in block.parameters()}
    every = [tensor for cut in cuts for tensor in cut.tensors]
    count, trained = len(cuts), _count_trained(model)
    if sample is not None:  # each stands for those like it
        for at, times in zip(range(len(blocks)), itertools.cycle(sample.values()), strict=False):
            if more := round(times) - 1:
                every += [replace(tensor, times=more) for tensor in cuts[at].tensors]
                trained += more * _count_trained(blocks[at])
                count += more
    return Shares(
        block=max(cuts, key=lambda cut: cut.gathered(1)),
        blocks=Cut(tuple(every)),
        count=count,
        root=_cut((p for p in model.parameters() if p not in inside), whole, set(), dtype),
        root_casts=dtype.itemsize
        * sum(
            linear.weight.numel()
            for linear in cast_linears(model, dtype, whole)
            if linear.weight not in narrow
        ),
        trained=_FLOAT * trained,
        trains_base=METHODS[config.method.kind].trains_base(config.method),
    )


def _count_trained(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _cut(
    parameters: Iterable[torch.nn.Parameter],
    whole: set[torch.nn.Parameter],
    narrow: set[torch.nn.Parameter],
    dtype: torch.dtype,
) -> Cut:
    """Return those of `parameters` that are not held `whole`; those of `narrow` sent in `dtype`."""
    return Cut(
        tuple(
            Piece(
                1,
                QUANTIZED if p.dtype in _CODES else WEIGHTS,
                p.shape[0],
                p.nbytes,
                p.numel() * dtype.itemsize if p in narrow else p.nbytes,
            )
            for p in parameters
            if p not in whole
        )
    )
