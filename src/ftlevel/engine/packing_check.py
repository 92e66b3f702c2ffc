"""Ask a model itself whether packed rows see each other: a few short passes before training.

What a family's attention does with a mask is known. What else mixes tokens (a convolution, a
recurrent state, code that came with the model) is not, and would leak from row to row in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ftlevel.data.collate import Collator
from ftlevel.data.encode import Encoded
from ftlevel.models.hardware import autocast
from ftlevel.speed.layout import Layout, laid_out

TOKENS = 16
"""Of each row that is tried; with its neighbour enough to see each other."""


def find_leak(
    model: Any,
    last_block: torch.nn.Module,
    rows: Sequence[Encoded],
    pad_id: int,
    device: str,
    dtype: str,
) -> str:
    """Return why rows of `model` cannot be packed, empty if they can.

    Args:
        model: with packed blocks on it; left in the mode that it is in.
        last_block: the last of them.
        rows: encoded rows, of which two are tried.
        pad_id: fills the batch.
        device: torch device type.
        dtype: compute precision's name.
    """
    first, second = (
        _shorten(row, size) for row, size in zip(_pair(rows), (TOKENS, 12), strict=True)
    )
    batch, other = (
        {name: value.to(device) for name, value in Collator(pad_id)(pair).items()}
        for pair in ([first, second], [_reversed(first), second])
    )
    layout = Layout.of_rows(batch["attention_mask"])
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dtype):
            plain = _states(model, last_block, batch, None)
            packed = _states(model, last_block, batch, layout)
            beside = _states(model, last_block, other, layout)
    except NotImplementedError as error:
        return str(error)
    finally:
        model.train(training)
    kept = batch["attention_mask"] != 0
    if not _differ(packed[1][kept[1]], beside[1][kept[1]]) < 1e-2:
        return "its rows see each other when they are packed"
    if not _differ(packed[kept], plain[kept]) < (1e-4 if dtype == "float32" else 1e-1):
        return "packed rows give other numbers than padded ones"
    return ""


def _pair(rows: Sequence[Encoded]) -> tuple[Encoded, Encoded]:
    longest = max(rows[:100], key=lambda row: len(row.input_ids))
    return longest, longest


def _shorten(row: Encoded, size: int) -> Encoded:
    """Return the first `size` tokens of `row`, with one number as its label."""
    extras = {name: values[:size] for name, values in row.extras.items()}
    return replace(row, input_ids=row.input_ids[:size], labels=0, extras=extras)


def _reversed(row: Encoded) -> Encoded:
    return replace(row, input_ids=row.input_ids[::-1])


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference, relative to the norm."""
    return ((one - other).norm() / other.norm()).item()


def _states(
    model: Any, last_block: torch.nn.Module, batch: dict[str, Any], layout: Layout | None
) -> torch.Tensor:
    """Return what the last block gives (batch, seq, hidden), in float32."""
    seen: list[torch.Tensor] = []

    def look(block: torch.nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - a hook
        states = output if isinstance(output, torch.Tensor) else output[0]
        seen.append(states.float())

    hook = last_block.register_forward_hook(look)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    try:
        with laid_out(layout):
            model(**inputs)
    finally:
        hook.remove()
    return seen[-1]
