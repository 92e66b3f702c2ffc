"""Read and write safetensors files one tensor at a time.

Format (safetensors README): eight bytes with the header's length, a JSON header with dtype, shape
and offsets of every tensor, and the data. Writing needs memory for one `Part`;
`safetensors.torch.save_file` needs all tensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ftlevel.errors import InputError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 1 << 22
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        """Return an empty tensor on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Return dtype and shape of `tensor`."""
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    spec: TensorSpec
    offset: int

    def read(self) -> torch.Tensor:
        """Read the tensor into newly allocated memory."""
        if self.spec.nbytes == 0:
            return torch.empty(self.spec.shape, dtype=self.spec.dtype)
        tensor = torch.empty(self.spec.nbytes, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            view = memoryview(tensor.numpy().data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise InputError(f"{self.path} ends before its header says. Is it incomplete?")
                view = view[count:]
        return tensor.view(self.spec.dtype).view(self.spec.shape)

    def copy_to(self, out: BinaryIO) -> None:
        """Append the tensor's bytes to `out`."""
        remaining = self.spec.nbytes
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while remaining:
                block = file.read(min(_BLOCK, remaining))
                if not block:
                    raise InputError(f"{self.path} ends before its header says. Is it incomplete?")
                out.write(block)
                remaining -= len(block)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the tensors of a safetensors file by name, and its metadata.

    Raises:
        InputError: the file is truncated, or has an unsupported dtype.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError("its header would be longer than the file")
            header = _entries(json.loads(file.read(size)))
    except (struct.error, ValueError, TypeError, RecursionError, OSError) as error:
        raise InputError(
            f"{path} is not a safetensors file ({error}). Is the copy incomplete?"
        ) from None
    metadata = header.pop("__metadata__", {})
    stored = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{path}: {name} is of type {entry['dtype']}, which is not a plain number. "
                f"Expected one of {', '.join(DTYPES)}."
            )
        spec = TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
        stored[name] = StoredTensor(path, spec, 8 + size + entry["data_offsets"][0])
    ends = (8 + size + entry["data_offsets"][1] for entry in header.values())
    if path.stat().st_size < max(ends, default=0):
        raise InputError(f"{path} is shorter than its header says. Is the copy incomplete?")
    return stored, metadata


def _entries(header: Any) -> dict[str, Any]:
    """Return `header` if it is valid, or raise TypeError."""

    def is_size(value: Any) -> bool:
        return isinstance(value, int) and 0 <= value < 1 << 63

    def is_entry(entry: Any) -> bool:
        return (
            isinstance(entry, dict)
            and isinstance(entry.get("dtype"), str)
            and isinstance(shape := entry.get("shape"), list)
            and all(map(is_size, shape))
            and isinstance(offsets := entry.get("data_offsets"), list)
            and all(map(is_size, offsets))
            and len(offsets) == 2
        )

    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise TypeError("its header is no table of tensors")
    wrong = [n for n, entry in header.items() if n != "__metadata__" and not is_entry(entry)]
    if wrong:
        raise TypeError(f"its header has no type, shape and place of {wrong[0][:80]!r}")
    return header


@dataclass(frozen=True)
class TensorPart:
    """Tensors that are written together.

    `specs` are in file order. `source` is a stored tensor to copy, or a function that returns the
    tensors by name.
    """

    specs: Mapping[str, TensorSpec]
    source: StoredTensor | Callable[[], Mapping[str, torch.Tensor]]


def write_file(path: Path, parts: Sequence[TensorPart]) -> None:
    """Write `parts` as one safetensors file and flush it to disk."""
    specs = [(name, spec) for part in parts for name, spec in part.specs.items()]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, spec in specs:
        end = start + spec.nbytes
        header[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            _write_part(file, part)
        file.flush()
        os.fsync(file.fileno())


def _write_part(file: BinaryIO, part: TensorPart) -> None:
    if isinstance(part.source, StoredTensor):
        part.source.copy_to(file)
        return
    tensors = part.source()
    for name, spec in part.specs.items():
        tensor = tensors[name].detach().cpu().contiguous()
        if spec_of(tensor) != spec:
            raise ValueError(f"{name} is {spec_of(tensor)} and was announced as {spec}")
        if spec.nbytes:
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)


def write_files(directory: Path, shards: Mapping[str, Sequence[TensorPart]]) -> int:
    """Write shards (file name → parts), with an index for several; return their tensor bytes."""
    total, where = 0, {}
    for name, parts in shards.items():
        write_file(directory / name, parts)
        for part in parts:
            where.update(dict.fromkeys(part.specs, name))
            total += sum(spec.nbytes for spec in part.specs.values())
    if len(shards) > 1:
        write_index(directory, where, total)
    return total


def write_index(directory: Path, weight_map: Mapping[str, str], size: int) -> None:
    """Write the index of several shards: tensor → file, and the total size in bytes."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def weight_files(directory: Path) -> list[Path]:
    """Return the weight files of a checkpoint that transformers loads, sorted.

    Raises:
        InputError: there are none, or one that the index names is missing.
    """
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{directory} has no model.safetensors and no index of shards.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{index} cannot be read ({error}). Is the copy incomplete?") from None
    paths = [directory / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{directory} lacks {missing[0]}, which its index names.")
    return paths
