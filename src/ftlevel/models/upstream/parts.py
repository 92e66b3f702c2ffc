"""Checkpoints of which each process writes and reads its own part, by torch.distributed.checkpoint.

They are safetensors, as torch and transformers call them: shard-00001-model-00001-of-00001 is the
first process's. Each file says which rows it has, so that another number of processes can read
them, too.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, zeros

from ftlevel.artifacts.files import write_json

_OF = "{number}.{name}"
_MOST_BYTES = 2 << 30


class PartsWriter:
    """Writes parts while the processes go on, which all of them ask for at the same time.

    Everything is copied to the host's memory before anything is written. The thread that writes
    has a group of processes of its own: what it says there is not taken for a step's.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._copied: list[tuple[Any, Any]] = []
        self._begun: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1)

    def copy(self, tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
        """Take a copy of this process's part of `tensors`, which is for `directory`."""
        writer: Any = HuggingFaceStorageWriter(str(directory), save_distributed=True)
        self._copied.append((writer.stage(_distinct(tensors)), writer))

    def begin(self) -> None:
        """Begin to write what was copied."""
        if self._group is None:
            self._group = distributed.new_group(backend="gloo")
        copied, self._copied = self._copied, []
        self._begun.append(self._thread.submit(self._write, copied))

    def _write(self, copied: list[tuple[Any, Any]]) -> None:
        while copied:
            parts, writer = copied.pop(0)
            save(parts, storage_writer=writer, process_group=self._group)

    def then(self, act: Callable[[], None]) -> None:
        """Have `act` done when what was begun before is written by all processes."""
        before = self._begun[-1]

        def follow() -> None:
            before.result()
            act()

        self._begun.append(self._thread.submit(follow))

    def end(self) -> None:
        """Wait for all that was begun.

        Raises:
            OSError: as of `write_parts`.
        """
        begun, self._begun = self._begun, []
        with _naming_failures():
            for future in begun:
                future.result()


def write_parts(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write this process's part of `tensors`, as all do at the same time; of tied ones the first.

    Raises:
        OSError: in all of them, what one of them could not write; the first one says it.
    """
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    with _naming_failures():
        save(_distinct(tensors), storage_writer=writer)


@contextlib.contextmanager
def _naming_failures() -> Iterator[None]:
    """Raise inside the block what a process could not write, in all of them."""
    try:
        yield
    except CheckpointException as failed:
        error: Any = next(iter(failed.failures.values()))[0]
        error.is_told = distributed.get_rank() > 0
        raise error from None


def read_parts(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Fill `tensors` (mutated) with this process's part of what lies in `directory`."""
    reader = HuggingFaceStorageReader(str(directory))
    load(_distinct(tensors), storage_reader=reader)


def put_together(directory: Path, out: Path) -> None:
    """Write the model whose parts are in `directory` to `out`, as any program reads it.

    A file of two gigabytes at most, or of one tensor, is held in memory at a time.
    """
    reader: Any = HuggingFaceStorageReader(str(directory))
    known = reader.read_metadata().state_dict_metadata
    files: list[list[str]] = [[]]
    size = 0
    for name, stored in known.items():
        own = stored.size.numel() * stored.properties.dtype.itemsize
        if files[-1] and size + own > _MOST_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += own
    places: dict[str, str] = {}
    for index, names in enumerate(files, 1):
        tensors = {n: torch.empty(known[n].size, dtype=known[n].properties.dtype) for n in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
        file = f"model-{index:05d}-of-{len(files):05d}.safetensors"
        if len(files) == 1:
            file = "model.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


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
