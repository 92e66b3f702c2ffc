"""Pack weights in 4 bits on the CPU: bitsandbytes' own bytes in less than half the time.

A block of 64 weights w is stored as its scale s = max |w| and the index of the code nearest to each
w / s (QLoRA, https://arxiv.org/abs/2305.14314, section 3). bitsandbytes 0.50 finds the index by a
binary search in the midpoints between the codes, which no vector unit helps with; here those below
w / s are counted, in pieces that stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import torch

from ftlevel.models.upstream.quantizers import four_bit_values
from ftlevel.weights.codes import Grid

BLOCK = 64
_PIECE = 1 << 16


def quantize_4bit(
    weight: torch.Tensor, quant_type: str, double_quant: bool
) -> tuple[torch.Tensor, Any]:
    """Return the packed bytes of `weight` and their `QuantState`, as bitsandbytes would.

    Args:
        weight: on the CPU, contiguous, in a floating-point type.
        quant_type: nf4 or fp4.
        double_quant: quantize the scales too.
    """
    import bitsandbytes.functional as bnb

    if (
        weight.numel() % BLOCK or weight.numel() == 0
    ):  # a short last block: rare, and scaled otherwise
        return bnb.quantize_4bit(
            weight, quant_type=quant_type, compress_statistics=double_quant, blocksize=BLOCK
        )
    code = four_bit_values(quant_type)
    packed, scales = _pack(weight.reshape(-1), code)
    return packed.unsqueeze(1), _state(scales, weight, code, quant_type, double_quant)


def four_bit_grid(quant_type: str, double_quant: bool) -> Grid:
    """Return what bitsandbytes stores in 4 bits."""

    def stored(scales: torch.Tensor) -> torch.Tensor:
        import bitsandbytes.functional as bnb

        if not double_quant:
            return scales
        offset = scales.mean()
        codes, state = bnb.quantize_blockwise(scales - offset, blocksize=256)
        read: torch.Tensor = bnb.dequantize_blockwise(codes, state) + offset
        return read

    return Grid(four_bit_values(quant_type).sort().values, BLOCK, stored)


def pack_4bit(
    codes: torch.Tensor, scales: torch.Tensor, like: torch.Tensor, quant_type: str,
    double_quant: bool,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """Return the bytes of chosen `codes` and their `QuantState`.

    Args:
        codes: (out, in), of `four_bit_grid`.
        scales: of the blocks, not yet as they are stored.
        like: a tensor of the shape and type that the weight is read in.
        quant_type: nf4 or fp4.
        double_quant: quantize the scales too.
    """
    code = four_bit_values(quant_type)
    own = code.argsort()[codes.reshape(-1)].to(torch.uint8)
    packed = (own[::2] << 4) | own[1::2]
    return packed.unsqueeze(1), _state(scales, like, code, quant_type, double_quant)


def _state(
    scales: torch.Tensor, like: torch.Tensor, code: torch.Tensor, quant_type: str,
    double_quant: bool,
) -> Any:  # fmt: skip
    import bitsandbytes.functional as bnb

    more = {}
    if double_quant:
        more["offset"] = scales.mean()
        scales, more["state2"] = bnb.quantize_blockwise(scales - more["offset"], blocksize=256)
    return bnb.QuantState(
        absmax=scales, shape=like.shape, dtype=like.dtype, blocksize=BLOCK, code=code,
        quant_type=quant_type, **more,
    )  # fmt: skip


def _pack(weight: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two codes a byte, the first in the upper half, and the scale of each block."""
    order = code.argsort()
    ascending = code[order]
    midpoints = ((ascending[:-1] + ascending[1:]) / 2).tolist()
    is_sorted = torch.equal(order, torch.arange(len(code)))
    packed = torch.empty(weight.numel() // 2, dtype=torch.uint8)
    scales = torch.empty(weight.numel() // BLOCK)
    buffer = torch.empty(min(_PIECE, weight.numel()), dtype=torch.bool)
    for begin in range(0, weight.numel(), _PIECE):
        piece = weight[begin : begin + _PIECE].float().view(-1, BLOCK)
        largest = piece.abs().amax(dim=-1)
        scaled = (piece * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1).view(-1)
        index, above = torch.zeros(len(scaled), dtype=torch.uint8), buffer[: len(scaled)]
        for midpoint in midpoints:
            torch.gt(scaled, midpoint, out=above)
            index.add_(above.view(torch.uint8))
        if not is_sorted:
            index = order[index.int()].to(torch.uint8)
        scales[begin // BLOCK : begin // BLOCK + len(largest)] = largest
        packed[begin // 2 : (begin + len(index)) // 2] = (index[::2] << 4) | index[1::2]
    return packed, scales
