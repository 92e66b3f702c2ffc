"""Types of a .gguf file: rounded as the gguf package rounds, and nothing beyond float16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize, quantize

from ftlevel.errors import RunError
from ftlevel.weights.gguf_file import (
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
def test_rounding_is_what_the_gguf_package_writes(outtype: str, scale: float) -> None:
    # Numbers of bfloat16 are often halfway between two levels, where formulas part.
    weight = (torch.randn(64, 96) * scale).bfloat16().float()
    kind = OUTTYPES[outtype][0]
    stored = torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))
    assert torch.equal(round_to(weight, outtype), stored)


def planned(value: torch.Tensor, outtype: str) -> GGUFTensor:
    return GGUFTensor("blk.0.ffn_up.weight", "up", tuple(value.shape), outtype, False, value.clone)


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_a_file_holds_what_it_was_given(tmp_path: Path, outtype: str) -> None:
    weight = torch.randn(3, 64)
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.rope.freq_base": 1e6,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.tokens": ["a", "é"],
    }
    done: list[int] = []
    tensor = planned(weight, outtype)
    save_gguf(tmp_path / "x.gguf", keys, [tensor], done.append)
    reader = GGUFReader(tmp_path / "x.gguf")
    assert {key: reader.get_field(key).contents() for key in keys} == keys
    (found,) = reader.tensors
    assert (found.name, list(found.shape), found.n_bytes) == (tensor.name, [64, 3], tensor.nbytes)
    stored = torch.tensor(dequantize(found.data, found.tensor_type))
    assert torch.equal(stored.reshape(3, 64), round_to(weight, outtype))
    assert done == [1]


@pytest.mark.parametrize("outtype", GRIDS)
def test_the_gguf_package_reads_the_codes_that_were_chosen(tmp_path: Path, outtype: str) -> None:
    """Each row's codes are others; the file has the rows in another order than the model."""
    grid, weight = GRIDS[outtype], torch.randn(4, 64)
    scales = grid.scales_of(weight)
    codes = torch.randint(0, len(grid.values), weight.shape)
    chosen = QuantizedMatrix(codes.to(torch.uint8), scales.view(4, 2))
    order = torch.tensor([2, 0, 3, 1])
    tensor = replace(planned(weight, outtype), codes=lambda: chosen, arrange=lambda x: x[order])
    save_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, [tensor], lambda _: None)
    (found,) = GGUFReader(tmp_path / "x.gguf").tensors
    stored = torch.tensor(dequantize(found.data, found.tensor_type)).reshape(4, 64)
    assert torch.equal(stored, chosen.value(outtype)[order])
    assert torch.equal(stored, (grid.values[codes] * grid.spread(scales.half().float(),
                                                                 codes.shape))[order])  # fmt: skip


@pytest.mark.parametrize("outtype", GRIDS)
def test_scales_that_fit_leave_less_error_of_what_counts(outtype: str) -> None:
    torch.manual_seed(0)
    grid, weight = GRIDS[outtype], torch.randn(16, 64)
    inputs = torch.randn(200, 64) * torch.linspace(0.1, 3, 64)
    moment = inputs.T @ inputs / 200

    def error(scales: torch.Tensor) -> torch.Tensor:
        stored = grid.stored(scales)
        missing = weight - grid.value(grid.nearest(weight, stored), stored)
        return (missing.square() * moment.diagonal()).view(-1, 32).sum(-1)

    whole, fitted = error(grid.scales_of(weight)), error(grid.fitted_scales(weight, moment))
    assert (fitted <= whole).all()
    if outtype in SELECTED_TYPES:  # the fewer the values, the more is won
        assert fitted.sum() < {"q5_0": 0.97, "q4_0": 0.9}[outtype] * whole.sum()
    flat = grid.fitted_scales(torch.zeros(2, 32), torch.eye(32))
    assert not flat.any()


def test_a_number_beyond_float16_is_refused(tmp_path: Path) -> None:
    tensor = planned(torch.tensor([[1e5, 0.0]]), "f16")
    with pytest.raises(RunError, match=r"up has values above float16.*--outtype bf16"):
        save_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, [tensor], print)
    assert not (tmp_path / "x.gguf").exists()
