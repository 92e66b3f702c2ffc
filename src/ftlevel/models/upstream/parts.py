"""Checkpoints of which each process writes and reads its own part, by torch.distributed.checkpoint.

They are safetensors, as torch and transformers call them: shard-00001-model-00001-of-00001 is the
first process's. Each file says which rows it has, so that another number of processes can read
them, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, zeros

_OF = "{number}.{name}"


def write_parts(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write this process's part of `tensors`, as all do at the same time; of tied ones the first.

    Raises:
        OSError: in all of them, what one of them could not write; the first one says it.
    """
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        save(_distinct(tensors), storage_writer=writer)
    except CheckpointException as failed:
        error: Any = next(iter(failed.failures.values()))[0]
        error.is_told = distributed.get_rank() > 0
        raise error from None


def read_parts(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Fill `tensors` (mutated) with this process's part of what lies in `directory`."""
    reader = HuggingFaceStorageReader(str(directory))
    load(_distinct(tensors), storage_reader=reader)


def _distinct(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each of `tensors` once, by the first of its names."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return {name: tensors[name].detach() for name in names.values()}


def parts_of_state(
    state: Mapping[int, Mapping[str, Any]],
) -> tuple[dict[str, DTensor], dict[int, dict[str, Any]]]:
    """Return what of an optimizer's state each process has a part of, by name, and the rest."""
    parts = {
        _OF.format(number=number, name=name): value
        for number, values in state.items()
        for name, value in values.items()
        if isinstance(value, DTensor)
    }
    rest = {
        number: {name: v for name, v in values.items() if not isinstance(v, DTensor)}
        for number, values in state.items()
    }
    return parts, rest


def read_state(
    rest: Mapping[int, Mapping[str, Any]], parameters: list[torch.Tensor], directory: Path
) -> dict[int, dict[str, Any]]:
    """Return an optimizer's state of the `rest` and what `directory` has of it.

    Args:
        rest: what `parts_of_state` gave.
        parameters: of the optimizer, in its order.
        directory: where the parts were written.
    """
    stored: Any = HuggingFaceStorageReader(str(directory)).read_metadata()
    state = {number: dict(values) for number, values in rest.items()}
    parts = {}
    for key, known in stored.state_dict_metadata.items():
        number, _, name = key.partition(".")
        like: Any = parameters[int(number)]
        parts[key] = zeros(
            known.size, dtype=known.properties.dtype, device_mesh=like.device_mesh,
            placements=like.placements,
        )  # fmt: skip
        state.setdefault(int(number), {})[name] = parts[key]
    read_parts(parts, directory)
    return state
