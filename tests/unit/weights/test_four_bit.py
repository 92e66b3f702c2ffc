"""Packing in 4 bits: bitsandbytes' own bytes and scales, whatever the numbers."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from ftlevel.weights.codes import _CHUNK, quantize_4bit


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def hard() -> torch.Tensor:
    """Every midpoint exactly, blocks of zeros, and the smallest and largest numbers."""
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
        draw((3, _CHUNK // 2 + 64), torch.bfloat16),  # pieces that end within a row
        draw((5, 13), torch.float32),  # a last block that is short
        draw((64, 64), torch.float32).T,
        hard(),
    ],
)
def test_the_bytes_are_those_of_bitsandbytes(
    quant_type: str, double: bool, weight: torch.Tensor
) -> None:
    weight = weight.contiguous()
    expected, state = bnb.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=double, blocksize=64
    )
    found, own = quantize_4bit(weight, quant_type, double)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)
    one, other = state.as_dict(packed=True), own.as_dict(packed=True)
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        assert torch.equal(other[name], value), name
        assert other[name].dtype == value.dtype, name
