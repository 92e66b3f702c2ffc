"""Dropout from a generator of the pass, so that passes side by side draw what they would in turn.

torch's dropout draws from the generator of the process: of two threads, whichever is first gets the
first numbers. Where a pass has a generator of its own, its seed decides what it drops.
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


def own_generator() -> torch.Generator | None:
    """Return the generator of the pass that this thread computes; None where it has none."""
    return _own.generator


@contextlib.contextmanager
def drawing_from(seed: int | None) -> Iterator[None]:
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


class PassDropout(nn.Dropout):
    """`nn.Dropout` that draws from the generator of the pass where there is one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `input` (any shape) with elements dropped, the others scaled by 1 / (1 - p)."""
        generator = own_generator()
        if generator is None or not self.training or self.p == 0.0:
            return super().forward(input)
        keep = torch.empty_like(input).bernoulli_(1 - self.p, generator=generator)
        return input * keep.div_(1 - self.p)


class OwnDraws:
    """The dropout modules of a model, replaced by ones that draw from the pass's generator.

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
            own = PassDropout(child.p)
            own.train(child.training)
            setattr(parent, name, own)

    def remove(self) -> None:
        """Put the modules back, in the mode that their replacements are in."""
        for parent, name, child in self._replaced:
            child.train(getattr(parent, name).training)
            setattr(parent, name, child)
