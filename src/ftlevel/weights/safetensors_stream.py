"""Writing a .safetensors file whose tensors become known one at a time.

`tensor_files` reads them, and writes files of which every type and shape is known beforehand.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftlevel.weights.tensor_files import NAMES

_ALIGNMENT = 8


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

    def note(self, name: str, text: str) -> None:
        """Say something of `name` in the file's metadata."""
        self._header["__metadata__"][name] = text

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)
        end = self._offset + tensor.nbytes
        self._header[name] = {
            "dtype": NAMES[tensor.dtype],
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
