"""Tests that files written tensor by tensor are valid safetensors, and damaged ones raise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftlevel.errors import InputError
from ftlevel.weights.checkpoint import load_header
from ftlevel.weights.quantize_shards import ShardWriter, header_bound

TENSORS = {
    "odd bytes": torch.arange(7, dtype=torch.uint8),
    "float": torch.randn(3, 5),
    "half": torch.randn(3).to(torch.bfloat16),
    "scalar": torch.tensor(2, dtype=torch.uint8),
    "transposed": torch.randn(4, 6).T,
    "empty": torch.empty(0, 4),
    "integers": torch.arange(9),
}


def write(path: Path) -> int:
    writer = ShardWriter(path, header_bound(dict.fromkeys(TENSORS, 1)))
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    return writer.close()


def test_safetensors_loads_written_file(tmp_path):
    path = tmp_path / "a.safetensors"
    assert write(path) == path.stat().st_size
    loaded = load_file(str(path))
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_tensors_are_aligned_to_their_dtype(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path)
    for name, stored in load_header(path)[0].items():
        assert stored.offset % stored.spec.dtype.itemsize == 0, name


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_truncated_file_raises(size, tmp_path):
    path = tmp_path / "a.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="Is the copy incomplete"):
        load_header(path)
