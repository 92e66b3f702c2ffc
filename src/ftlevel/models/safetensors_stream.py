"""Reading and writing .safetensors one tensor at a time, in plain memory.

`safe_open` maps the file, which counts against a memory limit as a whole; here one tensor is in
memory at a time. The format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ftlevel.errors import InputError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type, its shape, and where its bytes are, counted from the start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_entries(path: Path) -> dict[str, Entry]:
    """Return the tensors of the file at `path` by name.

    Raises:
        InputError: the file was cut short, or holds a type of tensor that torch has not.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(size))
    except (struct.error, ValueError, MemoryError, OverflowError) as error:
        raise InputError(
            f"{path} is not a safetensors file ({error}). Was a copy cut short?"
        ) from None
    entries = {}
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        if fields["dtype"] not in _DTYPES:
            raise InputError(f"{path}: {name} is of type {fields['dtype']}, which cannot be read.")
        begin, end = fields["data_offsets"]
        entries[name] = Entry(
            _DTYPES[fields["dtype"]], tuple(fields["shape"]), 8 + size + begin, 8 + size + end
        )
    if path.stat().st_size < max((entry.end for entry in entries.values()), default=0):
        raise InputError(f"{path} is shorter than its header says. Was a copy cut short?")
    return entries


def read_tensor(file: BinaryIO, entry: Entry) -> torch.Tensor:
    """Read one tensor from an open file into memory of its own."""
    data = bytearray(entry.end - entry.begin)
    file.seek(entry.begin)
    file.readinto(data)  # type: ignore[attr-defined]  # of every buffered file
    if not data:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


class ShardWriter:
    """Writes a .safetensors file in one pass: data first, then the header before it.

    A tensor whose size is no multiple of 8 bytes waits until the end, so that every tensor is
    aligned for its type; those are small in a real model.

    Args:
        path: the file to create.
        names: bytes to hold the header in; `header_bound` gives enough.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        self._file = path.open("wb")
        self._reserved = -(-header_bytes // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(8 + self._reserved)
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._waiting: list[tuple[str, torch.Tensor]] = []
        self._offset = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write `tensor` (any device, any layout) under `name`."""
        if tensor.nbytes % _ALIGNMENT:
            self._waiting.append((name, tensor))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)
        end = self._offset + tensor.nbytes
        self._header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, end],
        }
        self._offset = end

    def close(self) -> int:
        """Write what waits and the header; return the size of the file in bytes."""
        for name, tensor in sorted(self._waiting, key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        header = json.dumps(self._header, separators=(",", ":")).encode()
        if len(header) > self._reserved:
            raise ValueError(f"the header takes {len(header)} bytes of {self._reserved} reserved")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._reserved) + header.ljust(self._reserved))
        self._file.close()
        return 8 + self._reserved + self._offset


def header_bound(tensors: Mapping[str, int]) -> int:
    """Return how many bytes a header can take at most.

    Args:
        tensors: name → how many tensors are written whose names begin with it.
    """
    # 200 bytes hold a suffix, a type, a shape of few dimensions and two offsets.
    return 64 + sum(count * (len(json.dumps(name)) + 200) for name, count in tensors.items())
