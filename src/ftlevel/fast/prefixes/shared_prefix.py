"""What all rows of a step begin with, computed once for all of its passes.

    trunk    s s s               a pass of its own, whose keys and values every attention keeps
    passes   · · · a a           and puts before those of each pass: the passes compute what comes
             · · · b b           after it, and their gradients of its keys and values are added

A pass that shares prefixes (`speed.prefixes`) computes each once, and two passes compute it twice.
The gradient of the trunk is the sum over the passes, through one backward pass of its own:

    ∂L/∂θ = Σₚ ∂Lₚ/∂θ + (Σₚ ∂Lₚ/∂(K, V)) · ∂(K, V)/∂θ
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ftlevel.fast.packing.layout import NotServedError

Gradients = Sequence[torch.Tensor | None]


class Trunk:
    """Keys and values of the trunk, of every attention of a model.

    Attributes:
        tokens: how many it has.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._made: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._leaves: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] | None = None

    def close(self) -> None:
        """Take what its own pass has made as what goes before every other pass."""
        self._leaves = {
            module: (
                key.detach().requires_grad_(key.requires_grad),
                value.detach().requires_grad_(value.requires_grad),
            )
            for module, (key, value) in self._made.items()
        }

    def join(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keep keys and values in the trunk's own pass; put them before those of any other.

        Args:
            module: the attention that asks.
            query: (1, heads, own, head_dim).
            key: (1, key heads, own, head_dim).
            value: (1, key heads, own, value_dim).

        Returns:
            The three, of (…, tokens + own, …) where the trunk is done; its queries are zeros.

        Raises:
            NotServedError: an attention is gone through twice, or was not in the trunk's pass.
        """
        if self._leaves is None:
            if module in self._made:
                raise NotServedError("its blocks are gone through more than once")
            self._made[module] = (key, value)
            return query, key, value
        if module not in self._leaves:
            raise NotServedError("its passes do not go through the same blocks")
        before = self._leaves[module]
        empty = query.new_zeros(*query.shape[:2], self.tokens, query.shape[3])
        pairs = ((empty, query), (before[0], key), (before[1], value))
        joined = [torch.cat([first.to(own.dtype), own], dim=2) for first, own in pairs]
        return joined[0], joined[1], joined[2]

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Keys and values that a pass gives a gradient, in the order of the attentions."""
        return [part for _, part in self._with_graph()]

    def gradients(self, of_leaves: Gradients, parameters: Sequence[torch.Tensor]) -> Gradients:
        """Return the gradients of `parameters` through the trunk, which lets go of its graph.

        Args:
            of_leaves: the sum over the passes of the gradients of `leaves`; None for none.
            parameters: what is trained.
        """
        made = [part for part, _ in self._with_graph()]
        pairs = [(m, g) for m, g in zip(made, of_leaves, strict=True) if g is not None]
        if not pairs:
            return [None] * len(parameters)
        outputs, incoming = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, parameters, incoming, allow_unused=True)

    def _with_graph(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what was made and its leaf, for all that has a gradient."""
        leaves = self._leaves or {}
        return [
            (made, leaf)
            for module, pair in self._made.items()
            for made, leaf in zip(pair, leaves[module], strict=True)
            if made.requires_grad
        ]


_own = threading.local()


def current_trunk() -> Trunk | None:
    """Return the trunk of the pass that this thread computes, or None."""
    trunk: Trunk | None = getattr(_own, "trunk", None)
    return trunk


@contextlib.contextmanager
def along(trunk: Trunk | None) -> Iterator[None]:
    """Compute the pass of `trunk` inside the block, or one that goes on from it."""
    _own.trunk, before = trunk, current_trunk()
    try:
        yield
    finally:
        _own.trunk = before
