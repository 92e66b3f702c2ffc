"""Faults of a fast step, to be planted one at a time: what `benchmarks/verify.py` looks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from ftlevel.fast.attention import packed
from ftlevel.fast.layers.fused_lora import FusedLoraFunction
from ftlevel.fast.layers.norm_glu import _Norm
from ftlevel.fast.packing import PackedLayout, Segment, current_layout, using_layout
from ftlevel.fast.prefixes import SharedPrefix
from ftlevel.tasks.tokens import Tokens
from ftlevel.training.trainer import FtlevelTrainer

Fault = Callable[[], contextlib.AbstractContextManager[Any]]


def scaled_gradient(function: Any, argument: int, factor: float) -> Fault:
    """Return a backward pass of `function` whose gradient of one argument is off by a factor."""
    right = function.backward

    def wrong(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        made = list(right(ctx, *gradients))
        made[argument] = None if made[argument] is None else made[argument] * factor
        return tuple(made)

    return lambda: mock.patch.object(function, "backward", staticmethod(wrong))


def scaled_update(factor: float) -> Fault:
    """Return a LoRA layer whose update, and not its gradient, is off by a factor."""
    right = FusedLoraFunction.forward

    def wrong(ctx: Any, x: torch.Tensor, dropped: Any, a: Any, b: Any, bias: Any, weight: Any,
              *others: Any) -> torch.Tensor:  # fmt: skip
        made: torch.Tensor = right(ctx, x, dropped, a, b, bias, weight, *others)
        base = functional.linear(x, weight(), None if bias is None else bias.to(x.dtype))
        return made + (factor - 1) * (made - base)

    return lambda: mock.patch.object(FusedLoraFunction, "forward", staticmethod(wrong))


def neighbours_seen() -> Any:
    """Give the last token of each packed row to the next one."""
    right = PackedLayout.from_mask.__func__  # type: ignore[attr-defined]

    def wrong(cls: type, mask: torch.Tensor) -> PackedLayout:
        layout: PackedLayout = right(cls, mask)
        stops = [s.stop - 1 for s in layout.segments[:-1]] + [layout.segments[-1].stop]
        starts = [0, *stops[:-1]]
        moved = tuple(Segment(a, b) for a, b in zip(starts, stops, strict=True))
        return replace(layout, segments=moved)

    return mock.patch.object(PackedLayout, "from_mask", classmethod(wrong))


def position_off() -> Any:
    """Place the later half of each packed row one position on, the last token aside."""
    right: Any = PackedLayout.column.func  # type: ignore[attr-defined]

    def wrong(layout: PackedLayout) -> torch.Tensor:
        column = right(layout)
        return (column + (column > layout.seq // 4).long()).clamp(max=layout.seq - 1)

    return mock.patch.object(PackedLayout, "column", property(wrong))


def target_off() -> Any:
    """Predict each target from one token too early."""
    right = Tokens.locate

    def wrong(objective: Tokens, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at, targets = right(objective, labels)
        return (at - 1).clamp(min=0), targets

    return mock.patch.object(Tokens, "locate", wrong)


def mask_lost() -> Any:
    """Let the packed rows of one layer see one another."""
    right = packed.attend

    def wrong(module: Any, *arguments: Any, **others: Any) -> Any:
        layout = current_layout()
        if layout is None or getattr(module, "layer_idx", 0) != 1:
            return right(module, *arguments, **others)
        whole = replace(layout, segments=(Segment(0, layout.tokens),))
        with using_layout(whole, own_thread=True):
            return right(module, *arguments, **others)

    @contextlib.contextmanager
    def planted() -> Iterator[None]:
        with mock.patch.object(packed, "attend", wrong):
            packed.register()
            yield
        packed.register()

    return planted()


def micro_batch_lost() -> Any:
    """Leave out the last micro-batch of a step."""
    right = FtlevelTrainer.training_step

    def wrong(trainer: Any, model: Any, inputs: dict[str, Any], count: Any = None) -> Any:
        if len(inputs["micro_batches"]) > 1:
            inputs = {**inputs, "micro_batches": inputs["micro_batches"][:-1]}
        return right(trainer, model, inputs, count)

    return mock.patch.object(FtlevelTrainer, "training_step", wrong)


def count_off() -> Any:
    """Divide the loss of a step by one target too many."""
    right = FtlevelTrainer.count_targets

    def wrong(trainer: Any, *arguments: Any) -> torch.Tensor:
        return right(trainer, *arguments) + 1

    return mock.patch.object(FtlevelTrainer, "count_targets", wrong)


def prefix_gradient_lost() -> Any:
    """Drop one gradient that micro-batches give a shared prefix."""
    right = SharedPrefix.gradients

    def wrong(prefix: SharedPrefix, of_leaves: Any, parameters: Any) -> Any:
        return right(prefix, [None, *list(of_leaves)[1:]], parameters)

    return mock.patch.object(SharedPrefix, "gradients", wrong)


LORA: dict[str, Fault] = {
    **{f"gradient of A × {f:g}": scaled_gradient(FusedLoraFunction, 2, f)
       for f in (-1, 0, 1.02, 1.04)},
    "gradient of B × 1.02": scaled_gradient(FusedLoraFunction, 3, 1.02),
    "update × 1.01": scaled_update(1.01),
    "update × 2": scaled_update(2.0),
}  # fmt: skip
"""What only a fused LoRA layer can have."""

NORMS: dict[str, Fault] = {"gradient through norms × 1.02": scaled_gradient(_Norm, 0, 1.02)}
"""What only fused norms can have: RMS norms of decoders."""

COUNTS: dict[str, Fault] = {
    "targets counted one too many": count_off,
    "one micro-batch lost": micro_batch_lost,
}

PACKING: dict[str, Fault] = {
    "rows see each other by one token": neighbours_seen,
    "mask lost in one layer": mask_lost,
    **COUNTS,
}

TEXT: dict[str, Fault] = {"a target off by one": target_off, "positions off by one": position_off}
"""What only a decoder's rows can have."""

PREFIX: dict[str, Fault] = {"a shared prefix's gradient lost": prefix_gradient_lost}
"""What needs rows that begin alike, on two threads."""
