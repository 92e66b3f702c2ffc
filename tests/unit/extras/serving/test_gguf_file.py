"""Tests of .gguf tensor types: rounding as in the gguf package, and float16 overflow."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize, quantize

from ftlevel.errors import RunError
from ftlevel.extras.serving.gguf_file import (
    GRIDS,
    OUTTYPES,
    SELECTED_TYPES,
    GGUFTensor,
    QuantizedMatrix,
    round_to,
    save_gguf,
)


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_rounding_matches_gguf_package(outtype, scale):
    # bfloat16 values are often halfway between two levels, where formulas differ.
    weight = (torch.randn(64, 96) * scale).bfloat16().float()
    kind = OUTTYPES[outtype][0]
    stored = torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))
    assert torch.equal(round_to(weight, outtype), stored)


def create_tensor(value: torch.Tensor, outtype: str) -> GGUFTensor:
    return GGUFTensor("blk.0.ffn_up.weight", "up", tuple(value.shape), outtype, False, value.clone)


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_gguf_reader_reads_keys_and_tensors(tmp_path, outtype):
    weight = torch.randn(3, 64)
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.rope.freq_base": 1e6,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.tokens": ["a", "é"],
    }
    progress: list[int] = []
    tensor = create_tensor(weight, outtype)
    save_gguf(tmp_path / "x.gguf", keys, [tensor], progress.append)
    reader = GGUFReader(tmp_path / "x.gguf")
    assert {key: reader.get_field(key).contents() for key in keys} == keys
    (stored_tensor,) = reader.tensors
    assert (stored_tensor.name, list(stored_tensor.shape), stored_tensor.n_bytes) == (
        tensor.name,
        [64, 3],
        tensor.nbytes,
    )
    stored = torch.tensor(dequantize(stored_tensor.data, stored_tensor.tensor_type))
    assert torch.equal(stored.reshape(3, 64), round_to(weight, outtype))
    assert progress == [1]


@pytest.mark.parametrize("outtype", GRIDS)
def test_gguf_package_dequantizes_selected_codes(tmp_path, outtype):
    """Rows of the file are in another order than rows of the model."""
    grid, weight = GRIDS[outtype], torch.randn(4, 64)
    scales = grid.scales_of(weight)
    codes = torch.randint(0, len(grid.values), weight.shape)
    quantized = QuantizedMatrix(codes.to(torch.uint8), scales.view(4, 2))
    order = torch.tensor([2, 0, 3, 1])
    tensor = replace(
        create_tensor(weight, outtype), codes=lambda: quantized, arrange=lambda x: x[order]
    )
    save_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, [tensor], lambda _: None)
    (stored_tensor,) = GGUFReader(tmp_path / "x.gguf").tensors
    stored = torch.tensor(dequantize(stored_tensor.data, stored_tensor.tensor_type)).reshape(4, 64)
    assert torch.equal(stored, quantized.value(outtype)[order])
    assert torch.equal(stored, (grid.values[codes] * grid.spread(scales.half().float(),
                                                                 codes.shape))[order])  # fmt: skip


@pytest.mark.parametrize("outtype", GRIDS)
def test_fitted_scales_reduce_weighted_error(outtype):
    torch.manual_seed(0)
    grid, weight = GRIDS[outtype], torch.randn(16, 64)
    inputs = torch.randn(200, 64) * torch.linspace(0.1, 3, 64)
    moment = inputs.T @ inputs / 200

    def compute_error(scales: torch.Tensor) -> torch.Tensor:
        stored = grid.stored(scales)
        difference = weight - grid.value(grid.nearest(weight, stored), stored)
        return (difference.square() * moment.diagonal()).view(-1, 32).sum(-1)

    plain, fitted = (
        compute_error(grid.scales_of(weight)),
        compute_error(grid.fitted_scales(weight, moment)),
    )
    assert (fitted <= plain).all()
    if outtype in SELECTED_TYPES:  # coarser grids gain more
        assert fitted.sum() < {"q5_0": 0.97, "q4_0": 0.9}[outtype] * plain.sum()
    zero_scales = grid.fitted_scales(torch.zeros(2, 32), torch.eye(32))
    assert not zero_scales.any()


def test_value_above_float16_raises(tmp_path):
    tensor = create_tensor(torch.tensor([[1e5, 0.0]]), "f16")
    with pytest.raises(RunError, match=r"up has values above float16.*--outtype bf16"):
        save_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, [tensor], print)
    assert not (tmp_path / "x.gguf").exists()


def test_full_disk_is_reported_with_the_file(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path, tensor = tmp_path / "x.gguf", create_tensor(torch.zeros(256, 64), "f32")
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match=r"x\.gguf") as caught:
            save_gguf(path, {"general.architecture": "llama"}, [tensor], print)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.ENOSPC
    assert not path.exists()
