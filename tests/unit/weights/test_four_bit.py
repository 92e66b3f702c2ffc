"""Tests that 4-bit packing gives bitsandbytes' bytes and scales for any values."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from ftlevel.weights.codes import _CHUNK, quantize_4bit


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def create_edge_cases() -> torch.Tensor:
    """Return a weight with exact midpoints, zero blocks, and smallest and largest values."""
    weight = torch.zeros(8, 64)
    for row, name in enumerate(("nf4", "fp4")):
        code = bnb.get_4bit_type(name, device="cpu").sort().values
        weight[row, :15] = (code[1:] + code[:-1]) / 2
        weight[row, 16:32] = code
        weight[row, 63] = 1
    weight[3] = 1e-40
    weight[4] = -0.0
    weight[5, 0], weight[6, 0] = 3e38, -3e38
    return weight


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "weight",
    [
        *(draw((96, 64), dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
        draw((3, _CHUNK // 2 + 64), torch.bfloat16),  # chunks that end within a row
        draw((5, 13), torch.float32),  # an incomplete last block
        draw((64, 64), torch.float32).T,
        create_edge_cases(),
    ],
)
def test_packed_bytes_match_bitsandbytes(quant_type, double, weight):
    weight = weight.contiguous()
    expected, state = bnb.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=double, blocksize=64
    )
    actual, actual_state = quantize_4bit(weight, quant_type, double)
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)
    expected_dict, actual_dict = state.as_dict(packed=True), actual_state.as_dict(packed=True)
    assert sorted(expected_dict) == sorted(actual_dict)
    for name, value in expected_dict.items():
        assert torch.equal(actual_dict[name], value), name
        assert actual_dict[name].dtype == value.dtype, name
