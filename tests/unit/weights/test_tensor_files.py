"""safetensors files, written as a stream and read a tensor at a time."""

from __future__ import annotations

import json
import struct
from pathlib import Path

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


def draw() -> dict[str, torch.Tensor]:
    tensors = {name: (torch.rand(3, 5) * 100).to(dtype) for name, dtype in DTYPES.items()}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}


def part(name: str, tensor: torch.Tensor) -> TensorPart:
    return TensorPart({name: get_tensor_info(tensor)}, lambda: {name: tensor})


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = draw()
    write_file(tmp_path / "a.safetensors", [part(n, t) for n, t in tensors.items()])
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["a" * length for length in range(1, 9)])
def test_tensors_begin_where_they_can_be_mapped(name: str, tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", [part(name, torch.ones(2))])
    (header,) = struct.unpack("<Q", (tmp_path / "a.safetensors").read_bytes()[:8])
    assert header % 8 == 0


def test_what_safetensors_writes_is_read_and_copied(tmp_path: Path) -> None:
    tensors = draw()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    stored, metadata = load_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        read = stored[name].read()
        assert torch.equal(read, tensor)
        read.zero_()  # memory of its own: the file is not changed
        assert torch.equal(stored[name].read(), tensor)
    write_file(tmp_path / "b.safetensors", [TensorPart({n: t.spec}, t) for n, t in stored.items()])
    found = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_several_files_have_an_index(tmp_path: Path) -> None:
    first, second = torch.rand(4), torch.rand(2, 2)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards = {names[0]: [part("x", first)], names[1]: [part("y", second)]}
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


def test_a_tensor_that_is_not_what_was_announced_is_an_error(tmp_path: Path) -> None:
    wrong = TensorPart({"x": get_tensor_info(torch.rand(3))}, lambda: {"x": torch.rand(4)})
    with pytest.raises(ValueError, match="was announced as"):
        write_file(tmp_path / "a.safetensors", [wrong])


@pytest.mark.parametrize("content", [b"", b"12345678", b"\x02\0\0\0\0\0\0\0no"])
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a safetensors file"):
        load_header(path)


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
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
     {"a": {**ENTRY, "data_offsets": ["0", 8]}}, {"a": {"dtype": "F32", "shape": [2]}}],
)  # fmt: skip
def test_a_header_of_another_shape_is_refused(header: object, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(InputError, match="is not a safetensors file"):
        load_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "header", [None, 7, [], ["a"], {"a": None}, {"a": {"dtype": "F32", "shape": [2]}},
               {"a": {**ENTRY, "data_offsets": [8, 2**40]}}],
)  # fmt: skip
def test_a_header_of_another_shape_has_no_fingerprint(header: object, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(InputError, match="is not a safetensors file"):
        base_fingerprint(tmp_path)
