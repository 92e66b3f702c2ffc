"""Let the blocks of a model see rows without padding, by hooks on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ftlevel.fast.packing.layout import current_layout


class PackedBlocks:
    """Hooks that lay a batch out before the first block and pad it again after the last one.

    Blocks that a model goes through several times (ALBERT) are packed and padded each time.

    Args:
        blocks: the blocks of the model, in their order (mutated).
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._hooks = [
            block.register_forward_pre_hook(_enter, with_kwargs=True, prepend=True)
            for block in blocks
        ]
        self._hooks.append(blocks[-1].register_forward_hook(_leave))

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _enter(
    block: nn.Module,  # noqa: ARG001 - the signature of a hook
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pack what a block is called with; the blocks after the first get their states packed."""
    layout = current_layout()
    if layout is None or layout.is_whole_row:
        return None
    states, *others = args if args else (kwargs["hidden_states"],)
    if layout.is_padded(states):
        states = layout.pack(states)
    kwargs = {name: layout.pack_inputs(value) for name, value in kwargs.items()}
    if args:
        return (states, *(layout.pack_inputs(value) for value in others)), kwargs
    return (), {**kwargs, "hidden_states": states}


def _leave(
    block: nn.Module,  # noqa: ARG001 - the signature of a hook
    args: tuple[Any, ...],  # noqa: ARG001 - the signature of a hook
    output: Any,
) -> Any:
    """Pad what the last block returns: its states, alone or first in a tuple."""
    layout = current_layout()
    if layout is None or layout.is_whole_row:
        return None
    if isinstance(output, torch.Tensor):
        return layout.unpack(output)
    return (layout.unpack(output[0]), *output[1:])
