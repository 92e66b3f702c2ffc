"""Tensors that the backward pass makes again from others that are kept anyway.

A norm's output and a gated activation are kept by the linears that read them, for the gradient of A
alone. Both are a few elementwise operations away from what the norm and the gate keep for
themselves: in place of (tokens, width) numbers a linear keeps a `Recipe`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ftlevel.models.upstream.tensors import version_of

_NAME = "_ftlevel_recipe"


class Recipe:
    """How a tensor is made again.

    Args:
        make: what was kept → the tensor, bit for bit.
        kept: without a graph.
    """

    def __init__(self, make: Callable[..., torch.Tensor], *kept: torch.Tensor) -> None:
        self._make = make
        self.kept = kept
        self._users = 0
        self._made: torch.Tensor | None = None

    def enter(self) -> tuple[torch.Tensor, ...]:
        """Count a node that will make the tensor, and return what it has to save."""
        self._users += 1
        return self.kept

    def make(self, *saved: torch.Tensor) -> torch.Tensor:
        """Return the tensor, which is held until the last of its nodes has asked for it.

        Args:
            saved: what `enter` returned, as autograd gives it back.
        """
        self._users -= 1
        made = self._make(*saved) if self._made is None else self._made
        self._made = made if self._users > 0 else None
        return made


def with_recipe(
    tensor: torch.Tensor, make: Callable[..., torch.Tensor], *kept: torch.Tensor
) -> torch.Tensor:
    """Return `tensor`, which from now on says how it is made again (mutated)."""
    recipe = Recipe(make, *(part.detach() for part in kept))
    setattr(tensor, _NAME, (recipe, version_of(tensor)))
    return tensor


def recipe_of(tensor: torch.Tensor) -> Recipe | None:
    """Return how `tensor` is made again; None where it has to be kept.

    So have views and copies, and a tensor that was written to since.
    """
    recipe, version = getattr(tensor, _NAME, (None, None))
    return recipe if version == version_of(tensor) else None
