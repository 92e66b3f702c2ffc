"""Files written tensor by tensor are safetensors that the library reads, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert write(path) == path.stat().st_size
    found = load_file(str(path))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, str(path))
    stored, _ = load_header(path)
    for name, tensor in TENSORS.items():
        assert torch.equal(stored[name].read(), tensor)


def test_every_tensor_is_aligned_for_its_type(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    for name, stored in load_header(path)[0].items():
        assert stored.offset % stored.spec.dtype.itemsize == 0, name


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_a_file_that_was_cut_short_is_named(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="Is the copy incomplete"):
        load_header(path)
