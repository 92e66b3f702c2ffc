"""Tests of safetensors files that are streamed to disk and read one tensor at a time."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftlevel.artifacts.files import base_fingerprint
from ftlevel.errors import InputError
from ftlevel.weights.checkpoint import (
    DTYPES,
    TensorPart,
    get_tensor_info,
    load_header,
    weight_files,
    write_file,
    write_files,
)


def create_tensors() -> dict[str, torch.Tensor]:
    tensors = {name: (torch.rand(3, 5) * 100).to(dtype) for name, dtype in DTYPES.items()}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}


def create_part(name: str, tensor: torch.Tensor) -> TensorPart:
    return TensorPart({name: get_tensor_info(tensor)}, lambda: {name: tensor})


def test_safetensors_loads_written_file(tmp_path):
    tensors = create_tensors()
    write_file(tmp_path / "a.safetensors", [create_part(n, t) for n, t in tensors.items()])
    loaded = load_file(tmp_path / "a.safetensors")
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["a" * length for length in range(1, 9)])
def test_header_length_is_multiple_of_eight(name, tmp_path):
    write_file(tmp_path / "a.safetensors", [create_part(name, torch.ones(2))])
    (header,) = struct.unpack("<Q", (tmp_path / "a.safetensors").read_bytes()[:8])
    assert header % 8 == 0


def test_safetensors_file_is_loaded_and_copied(tmp_path):
    tensors = create_tensors()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    stored, metadata = load_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        value = stored[name].read()
        assert torch.equal(value, tensor)
        value.zero_()  # a copy: the file is not changed
        assert torch.equal(stored[name].read(), tensor)
    write_file(tmp_path / "b.safetensors", [TensorPart({n: t.spec}, t) for n, t in stored.items()])
    loaded = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_sharded_files_have_an_index(tmp_path):
    first, second = torch.rand(4), torch.rand(2, 2)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards = {names[0]: [create_part("x", first)], names[1]: [create_part("y", second)]}
    assert write_files(tmp_path, shards) == 32
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 32},
        "weight_map": dict(zip("xy", names, strict=True)),
    }
    assert [path.name for path in weight_files(tmp_path)] == names
    (tmp_path / names[0]).unlink()
    with pytest.raises(InputError, match=r"lacks model-00001-of-00002\.safetensors"):
        weight_files(tmp_path)


def test_tensor_that_differs_from_its_info_raises(tmp_path):
    wrong = TensorPart({"x": get_tensor_info(torch.rand(3))}, lambda: {"x": torch.rand(4)})
    with pytest.raises(ValueError, match="was announced as"):
        write_file(tmp_path / "a.safetensors", [wrong])


@pytest.mark.parametrize("content", [b"", b"12345678", b"\x02\0\0\0\0\0\0\0no"])
def test_invalid_safetensors_file_raises(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a safetensors file"):
        load_header(path)


def test_truncated_file_raises(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.rand(1000)}, path)
    (stored,) = load_header(path)[0].values()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="is shorter than its header says"):
        load_header(path)
    with pytest.raises(InputError, match="ends before its header says"):
        stored.read()
    with pytest.raises(InputError, match="ends before its header says"):
        write_file(tmp_path / "b.safetensors", [TensorPart({"x": stored.spec}, stored)])


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [None, 7, [], ["a"], {"a": None}, {"a": {**ENTRY, "dtype": 3}}, {"a": {**ENTRY, "shape": [-1]}},
     {"a": {**ENTRY, "shape": "x"}}, {"a": {**ENTRY, "data_offsets": [0]}}, {"__metadata__": []},
     {"a": {**ENTRY, "data_offsets": ["0", 8]}}, {"a": {"dtype": "F32", "shape": [2]}},
     {"a": {**ENTRY, "data_offsets": [8, 2**40]}}],
)  # fmt: skip
def test_malformed_header_raises(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    for read, path in ((load_header, tmp_path / "model.safetensors"), (base_fingerprint, tmp_path)):
        with pytest.raises(InputError, match="is not a safetensors file"):
            read(path)
