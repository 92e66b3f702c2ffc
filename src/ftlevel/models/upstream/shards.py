"""torch's DTensor: a tensor of which each process holds some rows."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`, which all processes must ask for at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(all_of_it: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the rows of `all_of_it` that this process holds of `like`, which has its shape."""
    if not isinstance(like, DTensor):
        return all_of_it
    start, end = rows_of(like)
    return all_of_it[start:end]


def rows_of(tensor: DTensor) -> tuple[int, int]:
    """Return the first row of `tensor` that this process holds, and the one after its last.

    fully_shard cuts along the first dimension, as torch.chunk does; the last parts may be empty.
    """
    rows, mesh = tensor.shape[0], tensor.device_mesh
    each, rank = -(-rows // mesh.size()), mesh.get_local_rank()
    return min(rank * each, rows), min((rank + 1) * each, rows)
