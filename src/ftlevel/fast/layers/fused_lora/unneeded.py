"""The product that a recomputed block does not need.

The backward pass computes a block again for what its operations had saved. Of the linear with which
a block ends, out = states + down(…), that is the input and the update's inner part: no gradient
asks for the product itself, which is as much as a tenth of the block. A block is asked once, by the
graph of its own output, whether it ends like that; the layer gives NaN then in the place of a
product that nobody reads, so that a reader would be heard of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ftlevel.models.upstream.tensors import is_in_backward, order_of


def skip_unneeded_products(blocks: Sequence[nn.Module]) -> None:
    """Have the fused linears that `blocks` (mutated) end with compute nothing again."""
    for block in blocks:
        _ask_once(block)


def _ask_once(block: nn.Module) -> None:
    def ask(block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - a hook
        states = output[0] if isinstance(output, tuple) and output else output
        if getattr(states, "grad_fn", None) is None or is_in_backward():
            return
        hook.remove()
        layer = _last_layer(states.grad_fn)
        if layer is not None:
            layer.ends_a_block = True

    hook = block.register_forward_hook(ask)


def _last_layer(added: Any) -> Any:
    """Return the fused layer whose product `added`, an output's `grad_fn`, adds to what was."""
    while added.name() == "ViewBackward0":
        ((added, _),) = added.next_functions
    if added.name() != "AddBackward0":
        return None
    # What was computed before something else may have been read by it.
    parents = [parent for parent, _ in added.next_functions if parent is not None]
    return getattr(max(parents, key=order_of, default=None), "layer", None)
