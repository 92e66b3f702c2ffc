"""What all rows of a step begin with, computed once for all of its micro-batches.

    prefix          s s s        a micro-batch of its own, whose keys and values every attention
    micro-batches   · · · a a    keeps and puts before those of the others: they compute what comes
                    · · · b b    after it, and their gradients of its keys and values are added

A micro-batch with a tree of prefixes (`prefixes.tree`) computes each once, and two micro-batches
compute it twice. The gradient of the shared prefix is the sum over the micro-batches, through one
backward pass of its own:

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


class SharedPrefix:
    """Keys and values of the shared prefix, of every attention of a model.

    Attributes:
        tokens: how many it has.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._made: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._leaves: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] | None = None

    def close(self) -> None:
        """Take what its own micro-batch has made as what goes before every other micro-batch."""
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
        """Keep keys and values in the prefix's own micro-batch; put them before those of any other.

        Args:
            module: the attention that asks.
            query: (1, heads, own, head_dim).
            key: (1, key heads, own, head_dim).
            value: (1, key heads, own, value_dim).

        Returns:
            The three, of (…, tokens + own, …) where the prefix is done; its queries are zeros.

        Raises:
            NotServedError: an attention is gone through twice, or the prefix did not meet it.
        """
        if self._leaves is None:
            if module in self._made:
                raise NotServedError("its blocks are gone through more than once")
            self._made[module] = (key, value)
            return query, key, value
        if module not in self._leaves:
            raise NotServedError("its micro-batches do not go through the same blocks")
        before = self._leaves[module]
        empty = query.new_zeros(*query.shape[:2], self.tokens, query.shape[3])
        pairs = ((empty, query), (before[0], key), (before[1], value))
        joined = [torch.cat([first.to(own.dtype), own], dim=2) for first, own in pairs]
        return joined[0], joined[1], joined[2]

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Keys and values that a micro-batch gives a gradient, in the order of the attentions."""
        return [part for _, part in self._with_graph()]

    def gradients(self, of_leaves: Gradients, parameters: Sequence[torch.Tensor]) -> Gradients:
        """Return the gradients of `parameters` through the prefix, which lets go of its graph.

        Args:
            of_leaves: the sum over the micro-batches of the gradients of `leaves`; None for none.
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


def current_prefix() -> SharedPrefix | None:
    """Return the shared prefix of the micro-batch that this thread computes, or None."""
    shared_prefix: SharedPrefix | None = getattr(_own, "shared_prefix", None)
    return shared_prefix


@contextlib.contextmanager
def using_prefix(shared_prefix: SharedPrefix | None) -> Iterator[None]:
    """Compute the micro-batch of `shared_prefix` inside the block, or one that goes on from it."""
    _own.shared_prefix, before = shared_prefix, current_prefix()
    try:
        yield
    finally:
        _own.shared_prefix = before
