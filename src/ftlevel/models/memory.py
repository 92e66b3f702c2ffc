"""The longest row that cannot be ruled out by the memory of a machine: a bound, not a promise.

    bytes(L) = P · (w + 12 where P is trained) + L · v · kept
    P        ≥ vocabulary · hidden + layers · 2 · hidden · (hidden + inner)
    kept     ≥ layers · (4 · hidden + 2 · inner), or with gradient checkpointing
               layers · hidden + 4 · hidden + 2 · inner

with weights of w bytes (and gradient and two moments of Adam in float32 beside those that are
trained) and activations of v bytes. For the backward pass a block keeps of each token at least the
inputs of its norms, what attention multiplies and gives, and two vectors of its inner part. Every
term is the least that it can be, so that a row beyond the bound fits nowhere, while one within it
may still need a smaller batch.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftlevel.models.threads import control_groups

_INNER = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "n_inner", "hidden_dim")
_TRAINED_BYTES = 12  # of a weight that is trained: gradient and two moments in float32


@dataclass(frozen=True)
class Holding:
    """How a model is held while it is trained.

    Attributes:
        weight: bytes of a weight of the base: 0.5 where it has 4 bits.
        value: bytes of an activation.
        trained: whether every weight is trained.
        checkpointing: whether activations are recomputed in the backward pass.
    """

    weight: float
    value: int
    trained: bool = False
    checkpointing: bool = False


def longest_in_memory(config: Any, holding: Holding, memory: int) -> int | None:
    """Return the most tokens of a row that `memory` may hold; None where length decides nothing.

    Args:
        config: of the model.
        holding: how it is held.
        memory: bytes of the device.
    """
    text = config.get_text_config()
    hidden, layers = getattr(text, "hidden_size", 0), getattr(text, "num_hidden_layers", 0)
    if not (isinstance(hidden, int) and isinstance(layers, int) and hidden and layers):
        return None
    # GPT-2 names no inner size where it is the usual one; the hidden size is less than that.
    inner = next((n for name in _INNER if isinstance(n := getattr(text, name, None), int)), hidden)
    weights = text.vocab_size * hidden + layers * 2 * hidden * (hidden + inner)
    block = 4 * hidden + 2 * inner
    kept = layers * hidden + block if holding.checkpointing else layers * block
    held = weights * (holding.weight + _TRAINED_BYTES * holding.trained)
    left = memory - held
    return int(left // (kept * holding.value)) if left > 0 else None


def device_memory(device: str) -> int:
    """Return the bytes of memory of a torch device: of the GPU, or of what this process may use."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    import psutil

    return min(
        [int(psutil.virtual_memory().total), *read_limits(control_groups(controller="memory"))]
    )


def release_freed_memory() -> None:
    """Return the freed pages of the C heap to the system, where it is glibc's.

    Blocks below the size from which malloc maps pages stay in the process when they are freed, as
    holes in the heap that the next phase of a run does not fill.
    """
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def read_limits(groups: Iterable[Path]) -> Iterator[int]:
    """Yield the limits in bytes of control groups of version 2 (memory.max) or 1."""
    for group in groups:
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                yield int((group / name).read_text())
            except (OSError, ValueError):  # "max" is no number
                continue


def read_free(groups: Iterable[Path]) -> Iterator[int]:
    """Yield the bytes that control groups of version 2 or 1 leave; cached files count as free."""
    for group in groups:
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                most, taken = (int((group / name).read_text()) for name in (limit, used))
                lines = (group / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # "max" is no number
                continue
            files = next((int(n) for name, n in map(str.split, lines) if name == cached), 0)
            yield max(0, most - (taken - files))
