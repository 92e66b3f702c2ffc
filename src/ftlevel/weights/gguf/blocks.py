"""ggml's small types: 32 numbers of a row share a scale d, kept in float16.

    q8_0   x ≈ d · q,  q = -127 … 127,  d = max |x| / 127
    q5_0   x ≈ d · q,  q = -16 … 15,    d = -(the x that is farthest from 0) / 16
    q4_0   x ≈ d · q,  q = -8 … 7,      d = -(the x that is farthest from 0) / 8

(ggml-quants.c: quantize_row_q8_0_ref, quantize_row_q5_0_ref, quantize_row_q4_0_ref.) So d of the
last two has a sign, by which the largest number is held exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ftlevel.weights.codes import Grid

BLOCK = 32


def _half(scales: torch.Tensor) -> torch.Tensor:
    return scales.half().float()


@dataclass(frozen=True)
class _SignedGrid(Grid):
    """One whose values reach farther on one side, to which a scale turns each block."""

    def scales_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the scale of each block: its largest is the value farthest from 0."""
        blocks = self._blocks(weight)
        farthest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return farthest / self.values[self.values.abs().argmax()]


GRIDS: dict[str, Grid] = {
    "q8_0": Grid(torch.arange(-127.0, 128.0), BLOCK, _half),
    "q5_0": _SignedGrid(torch.arange(-16.0, 16.0), BLOCK, _half),
    "q4_0": _SignedGrid(torch.arange(-8.0, 8.0), BLOCK, _half),
}
CHOSEN = ("q5_0", "q4_0")
"""Those whose codes are worth choosing: in q8_0 rounding loses next to nothing."""


@dataclass(frozen=True)
class Codes:
    """A matrix of blocks.

    Attributes:
        codes: (rows, columns), index of a value of the grid, uint8.
        scales: (rows, blocks), not yet as they are stored.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def value(self, outtype: str) -> torch.Tensor:
        """Return the matrix as it is read back, in float32."""
        grid = GRIDS[outtype]
        return grid.value(self.codes.long(), grid.stored(self.scales.reshape(-1)))

    def pack(self, outtype: str) -> Any:
        """Return its bytes, (rows, bytes of a row), as numpy has them."""
        rows = len(self.codes)
        d = self.scales.reshape(rows, -1, 1).half().view(torch.uint8)
        blocks = self.codes.reshape(rows, -1, BLOCK)
        if outtype == "q8_0":
            q = (blocks.int() - 127).to(torch.int8).view(torch.uint8)
            return torch.cat([d, q], -1).reshape(rows, -1).numpy()
        # Of four bits the first half of a block lies in the low ones, the second in the high ones.
        low, high = blocks[..., : BLOCK // 2] & 15, blocks[..., BLOCK // 2 :] & 15
        parts = [d, low | (high << 4)]
        if outtype == "q5_0":  # the fifth of each, eight to a byte, the first in the lowest
            fifth = (blocks >> 4).view(*blocks.shape[:2], -1, 8)
            weights = 2 ** torch.arange(8, dtype=torch.uint8)
            parts.insert(1, (fifth * weights).sum(-1, dtype=torch.uint8))
        return torch.cat(parts, -1).reshape(rows, -1).numpy()


def round_to_blocks(weight: torch.Tensor, outtype: str) -> torch.Tensor:
    """Return `weight` as it is after being rounded as ggml does and read, in float32.

    x · (1 / d) is rounded, away from zero at a half: x / d would round some the other way.
    """
    grid = GRIDS[outtype]
    scales = grid.scales_of(weight)
    inverse = torch.where(scales == 0, 0.0, 1 / scales).unsqueeze(-1)
    blocks = weight.reshape(-1, BLOCK)
    if outtype == "q8_0":
        levels = blocks * inverse
        rounded = levels.sign() * (levels.abs() + 0.5).floor()
    else:
        zero = len(grid.values) // 2
        rounded = (blocks * inverse + zero + 0.5).trunc().clamp(0, 2 * zero - 1) - zero
    return (rounded * grid.stored(scales).unsqueeze(-1)).reshape(weight.shape)
