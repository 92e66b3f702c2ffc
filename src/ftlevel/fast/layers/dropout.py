"""Dropout from a generator of each worker, so that it does not depend on which one is first.

torch's dropout draws from the generator of the process: of two threads, whichever is first gets the
first numbers. Where a micro-batch has a generator of its own, its seed decides what it drops.

On a CPU torch makes a draw of 64 bits for every element, which is a seventh of a step of MiniLM on
short rows. Here an element takes 16 bits of a draw (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn


class _Own(threading.local):
    generator: torch.Generator | None = None


_own = _Own()


def worker_generator() -> torch.Generator | None:
    """Return the generator of the micro-batch that this thread computes; None where it has none."""
    return _own.generator


@contextlib.contextmanager
def using_generator(seed: int | None) -> Iterator[None]:
    """Draw from a new generator inside the block, in this thread.

    Args:
        seed: of the generator; None leaves the process's.
    """
    before = _own.generator
    _own.generator = None if seed is None else torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        _own.generator = before


_CHANCES = 1 << 16


def dropout_mask(like: torch.Tensor, p: float) -> torch.Tensor:
    """Return what a tensor is multiplied by: 0 with probability `p`, and else 1 / (1 - p).

    It is drawn from the generator of the micro-batch, or else from torch's.

    Args:
        like: has the shape and the dtype of the result, which is contiguous; on a CPU.
        p: from 0 to below 1; rounded to 1/65,536, in both places.
    """
    count, dropped = like.numel(), min(round(p * _CHANCES), _CHANCES - 1)
    drawn = torch.empty(-(-count // 4), dtype=torch.int64)
    drawn.random_(-(1 << 63), None, generator=worker_generator())
    chances = drawn.view(torch.int16)[:count].view(like.shape)
    kept = torch.empty(like.shape, dtype=like.dtype)
    torch.ge(chances, dropped - _CHANCES // 2, out=kept)
    return kept.div_(1 - dropped / _CHANCES)


class GeneratorDropout(nn.Dropout):
    """`nn.Dropout` that draws as `dropout_mask`, on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `input` (any shape) with elements dropped, the others scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0.0 or input.device.type != "cpu":
            return super().forward(input)
        return input * dropout_mask(input, self.p)


class PerWorkerDropout:
    """The dropout modules of a model, replaced by `GeneratorDropout`.

    Args:
        model: with `nn.Dropout` modules (mutated until `remove`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._replaced: list[tuple[nn.Module, str, nn.Dropout]] = []
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                is_plain = type(child) is nn.Dropout  # of a subclass nothing is known
                if is_plain and isinstance(child, nn.Dropout) and child.p > 0 and not child.inplace:
                    self._replaced.append((parent, name, child))
        for parent, name, child in self._replaced:
            own = GeneratorDropout(child.p)
            own.train(child.training)
            setattr(parent, name, own)

    def remove(self) -> None:
        """Put the modules back, in the mode that their replacements are in."""
        for parent, name, child in self._replaced:
            child.train(getattr(parent, name).training)
            setattr(parent, name, child)
