"""Dropout from a generator of each worker, so that it does not depend on which one is first.

torch's dropout draws from the generator of the process: of two threads, whichever is first gets the
first numbers. Where a micro-batch has a generator of its own, its seed decides what it drops.

On a CPU torch makes a draw of 64 bits for every element, which is a seventh of a step of MiniLM on
short rows. Here an element takes 16 bits of a draw (docs/performance.md).

Tensors that the backward pass recomputes from others that are kept anyway.

A norm's output and a gated activation are kept by the linears that read them, for the gradient of A
alone. Both are a few elementwise operations away from what the norm and the GLU keep for
themselves: in place of (tokens, width) numbers a linear keeps a `Recomputation`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ftlevel.models.upstream.tensors import version_of


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


_NAME = "_ftlevel_recomputation"


class Recomputation:
    """How a tensor is recomputed, held by the autograd functions that use it.

    It holds no tensor between forward and backward: what it is recomputed from is saved by its
    users, through autograd, so that checkpointing and offloading see it as they see all that is
    saved.

    Args:
        make: what was saved → the tensor, bit for bit.
    """

    def __init__(self, make: Callable[..., torch.Tensor]) -> None:
        self._make = make
        self._users = 0
        self._made: torch.Tensor | None = None

    def enter(self) -> None:
        """Count an autograd function that will use the tensor."""
        self._users += 1

    def make(self, *saved: torch.Tensor) -> torch.Tensor:
        """Return the tensor, which is held until the last of its users has asked for it.

        Args:
            saved: what `recomputation_of` said is to be saved, as autograd gives it back.
        """
        self._users -= 1
        made = self._make(*saved) if self._made is None else self._made
        self._made = made if self._users > 0 else None
        return made


def with_recomputation(
    tensor: torch.Tensor, make: Callable[..., torch.Tensor], *kept: torch.Tensor
) -> torch.Tensor:
    """Return `tensor`, which from now on says how it is recomputed (mutated)."""
    parts = tuple(part.detach() for part in kept)
    setattr(tensor, _NAME, (Recomputation(make), parts, version_of(tensor)))
    return tensor


def recomputation_of(
    tensor: torch.Tensor,
) -> tuple[Recomputation, tuple[torch.Tensor, ...]] | None:
    """Return how `tensor` is recomputed, and from what; None where it has to be kept.

    So have views and copies, and a tensor that was written to since. Nothing is kept of a tensor of
    inference mode, which does not count what is written to it.
    """
    if tensor.is_inference():
        return None
    held: tuple[Recomputation, tuple[torch.Tensor, ...], int] | None
    held = getattr(tensor, _NAME, None)
    return held[:2] if held is not None and held[2] == version_of(tensor) else None
