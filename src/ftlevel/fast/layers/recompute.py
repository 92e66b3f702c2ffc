"""Tensors that the backward pass recomputes from others that are kept anyway.

A norm's output and a gated activation are kept by the linears that read them, for the gradient of A
alone. Both are a few elementwise operations away from what the norm and the GLU keep for
themselves: in place of (tokens, width) numbers a linear keeps a `Recomputation`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ftlevel.models.upstream.tensors import version_of

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
