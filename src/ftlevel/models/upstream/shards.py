"""torch's DTensor: a tensor of which each process holds some rows."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`, which all processes must ask for at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_host(state: Any) -> Any:
    """Return nested `state` with its tensors whole and in the host's memory, as of `whole`."""
    return tree_map(lambda v: whole(v).cpu() if isinstance(v, torch.Tensor) else v, state)


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


def as_part(all_of_it: torch.Tensor, like: DTensor) -> DTensor:
    """Return `all_of_it` cut as `like` is, on its device."""
    part = part_of(all_of_it, like).to(own_part(like).device, copy=True)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
