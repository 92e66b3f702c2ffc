"""Choose the codes of quantized weights by the layer's output error; pack weights in 4-bit.

    min e H eᵀ,  e = w - q (a row),  H = E[x xᵀ]

A weight w is stored as q = s · v, with the scale s of its block and one of a few values v. Rounding
to the nearest q can undo a small update; here the output error is minimized (GPTQ, section 3 of
arXiv:2210.17323). With other columns fixed, the error is least at q_j + (e H)_j / H_jj, and the
nearest value is chosen (coordinate descent, QuantEase, arXiv:2309.01885). After each sweep, the
error that remains in the output directions of the update is added to the target.

In 4 bits, a block of 64 weights has the scale s = max |w| and the code nearest to each w / s
(QLoRA, arXiv:2305.14314, section 3). Counting the midpoints below w / s takes half the time of
bitsandbytes' bisection, with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ftlevel.models.upstream.quantizers import four_bit_values

DAMPING = 0.01
"""Share of H's mean diagonal that is added to it, so that unseen directions count."""
SHRINKAGE = 0.5
"""Share of H's off-diagonal that is removed: from some thousand tokens it is less certain than the
diagonal. Of 0, .1, .3, .6 and .9, .6 leaves the least error (docs/merge.md).
"""
SWEEPS = 3
DIRECTIONS = 16
"""Number of output directions in which the update is preserved."""
_COLUMNS = 64
_SCALE_STEPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


@dataclass(frozen=True)
class QuantizationGrid:
    """Values that a quantized format can store: scale · value.

    Attributes:
        values: ascending values of the codes, for a scale of 1.
        block: weights per scale, in row order; 0 for a whole row.
        stored: function from scales to the scales that a file returns, such as rounded ones.
    """

    values: torch.Tensor
    block: int
    stored: Callable[[torch.Tensor], torch.Tensor]

    def scales_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns a scale per block, by which its largest |weight| becomes the largest |value|."""
        return self._blocks(weight).abs().amax(-1) / self.values.abs().max()

    def fitted_scales(self, weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        """Returns the scale per block with the least squared error, weighted by H's diagonal."""
        largest, counts = self.scales_of(weight), moment.diagonal()
        best, least = largest, torch.full_like(largest, torch.inf)
        for factor in _SCALE_STEPS:
            scales = self.stored(largest * factor)
            difference = weight - self.value(self.nearest(weight, scales), scales)
            error = self._blocks(difference.square() * counts).sum(-1)
            best = torch.where(error < least, largest * factor, best)
            least = torch.minimum(error, least)
        return best

    def nearest(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Returns the nearest code of each weight, as an index of `values`."""
        scaled = self._blocks(weight) / _not_zero(scales).unsqueeze(-1)
        return torch.bucketize(scaled, self._midpoints()).view(weight.shape)

    def value(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Returns the weights that `codes` and `scales` represent."""
        return self.values[codes] * self.spread(scales, codes.shape)

    def spread(self, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Returns a matrix of `shape` with the scale of each weight, from `scales` per block."""
        return scales.repeat_interleave(self.block or shape[1]).view(shape)

    def fits(self, shape: torch.Size) -> bool:
        """Returns whether a matrix of `shape` consists of whole blocks."""
        return shape.numel() % (self.block or shape[1]) == 0

    def _blocks(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.reshape(-1, self.block or weight.shape[1])

    def _midpoints(self) -> torch.Tensor:
        return (self.values[1:] + self.values[:-1]) / 2

    def nearest_column(self, column: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Returns the nearest codes of a `column` of weights with one scale each."""
        return torch.bucketize(column / scales, self._midpoints())


def select_codes(
    weight: torch.Tensor,
    update: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    moment: torch.Tensor,
    grid: QuantizationGrid,
) -> torch.Tensor:
    """Returns `codes` improved to preserve the layer's output, above all its change by `update`.

    `weight`, `update` and `codes` are (out, in), `moment` is H = E[x xᵀ] (in, in) of the layer's
    inputs. `scales` are as read back from the file.
    """
    directions, target, moment = compute_directions(update, moment), weight, shrunk(moment)
    for _ in range(SWEEPS):
        codes = improve_codes(target, codes, scales, moment, grid)
        difference = weight - grid.value(codes, scales)
        target = target + directions @ (directions.T @ difference)
    return codes


def compute_directions(update: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Returns (out, k) orthonormal output directions that `update` changes most; `moment` is H."""
    directions = torch.randn(
        len(update), min(DIRECTIONS, *update.shape), generator=torch.Generator().manual_seed(0)
    )
    if not update.any():
        return torch.zeros_like(directions)
    for _ in range(3):
        directions = torch.linalg.qr(update @ (moment @ (update.T @ directions))).Q
    return directions


def improve_codes(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    moment: torch.Tensor,
    grid: QuantizationGrid,
) -> torch.Tensor:
    """Returns `codes` after one sweep over all columns; arguments are as in `select_codes`."""
    weight_scales = _not_zero(grid.spread(scales, weight.shape))
    values, codes = grid.values[codes] * weight_scales, codes.clone()
    moment = damped(moment)
    gradient = (weight - values) @ moment
    for start in range(0, weight.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        pulls, block = gradient[:, columns].T.contiguous(), moment[columns, columns]
        value, scale = values[:, columns].T.contiguous(), weight_scales[:, columns].T.contiguous()
        errors = torch.zeros_like(value)
        for j in range(len(value)):
            column_codes = grid.nearest_column(value[j] + pulls[j] / block[j, j], scale[j])
            errors[j] = value[j] - grid.values[column_codes] * scale[j]
            codes[:, start + j] = column_codes
            pulls[j + 1 :].addr_(block[j, j + 1 :], errors[j])
        gradient.addmm_(errors.T, moment[columns])
    return codes


def _not_zero(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, 1e-38, scales)


def shrunk(moment: torch.Tensor) -> torch.Tensor:
    """Returns `moment` (H) with off-diagonal values multiplied by 1 - `SHRINKAGE`."""
    return (1 - SHRINKAGE) * moment + torch.diag(SHRINKAGE * moment.diagonal())


def damped(moment: torch.Tensor) -> torch.Tensor:
    """Returns `moment` (H) with a share of its mean diagonal added to the diagonal: invertible."""
    offset = DAMPING * moment.diagonal().mean().clamp(min=1e-30)
    return moment + offset * torch.eye(len(moment))


BLOCK = 64
_CHUNK = 1 << 16


def quantize_4bit(
    weight: torch.Tensor, quant_type: str, double_quant: bool
) -> tuple[torch.Tensor, Any]:
    """Returns the packed bytes of a CPU `weight` and their `QuantState`, equal to bitsandbytes'."""
    import bitsandbytes.functional as bnb

    if weight.numel() % BLOCK or weight.numel() == 0:  # bitsandbytes handles short last blocks
        return bnb.quantize_4bit(
            weight, quant_type=quant_type, compress_statistics=double_quant, blocksize=BLOCK
        )
    code = four_bit_values(quant_type)
    packed, scales = _pack(weight.reshape(-1), code)
    return packed.unsqueeze(1), _state(scales, weight, code, quant_type, double_quant)


def four_bit_grid(quant_type: str, double_quant: bool) -> QuantizationGrid:
    """Returns the grid of bitsandbytes' 4-bit types."""

    def round_scales(scales: torch.Tensor) -> torch.Tensor:
        import bitsandbytes.functional as bnb

        if not double_quant:
            return scales
        offset = scales.mean()
        codes, state = bnb.quantize_blockwise(scales - offset, blocksize=256)
        read: torch.Tensor = bnb.dequantize_blockwise(codes, state) + offset
        return read

    return QuantizationGrid(four_bit_values(quant_type).sort().values, BLOCK, round_scales)


def pack_4bit(
    codes: torch.Tensor,
    scales: torch.Tensor,
    like: torch.Tensor,
    quant_type: str,
    double_quant: bool,
) -> tuple[torch.Tensor, Any]:
    """Returns the packed bytes of `codes` (out, in) and their `QuantState`.

    `codes` index `four_bit_grid`; `scales` are unrounded; `like` has the weight's shape and dtype.
    """
    code = four_bit_values(quant_type)
    ordered = code.argsort()[codes.reshape(-1)].to(torch.uint8)
    output = (ordered[::2] << 4) | ordered[1::2]
    return output.unsqueeze(1), _state(scales, like, code, quant_type, double_quant)


def _state(
    scales: torch.Tensor,
    like: torch.Tensor,
    code: torch.Tensor,
    quant_type: str,
    double_quant: bool,
) -> Any:
    import bitsandbytes.functional as bnb

    nested = {}
    if double_quant:
        nested["offset"] = scales.mean()
        scales, nested["state2"] = bnb.quantize_blockwise(scales - nested["offset"], blocksize=256)
    return bnb.QuantState(
        absmax=scales,
        shape=like.shape,
        dtype=like.dtype,
        blocksize=BLOCK,
        code=code,
        quant_type=quant_type,
        **nested,
    )


def _pack(weight: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two codes per byte, the first in the upper half, and the scale of each block."""
    order = code.argsort()
    sorted_values = code[order]
    midpoints = ((sorted_values[:-1] + sorted_values[1:]) / 2).tolist()
    in_order = torch.equal(order, torch.arange(len(code)))
    output = torch.empty(weight.numel() // 2, dtype=torch.uint8)
    scales = torch.empty(weight.numel() // BLOCK)
    buffer = torch.empty(min(_CHUNK, weight.numel()), dtype=torch.bool)
    for start in range(0, weight.numel(), _CHUNK):
        chunk = weight[start : start + _CHUNK].float().view(-1, BLOCK)
        largest = chunk.abs().amax(dim=-1)
        scaled = (chunk * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1).view(-1)
        index, above = torch.zeros(len(scaled), dtype=torch.uint8), buffer[: len(scaled)]
        for midpoint in midpoints:
            torch.gt(scaled, midpoint, out=above)
            index.add_(above.view(torch.uint8))
        if not in_order:
            index = order[index.int()].to(torch.uint8)
        scales[start // BLOCK : start // BLOCK + len(largest)] = largest
        output[start // 2 : (start + len(index)) // 2] = (index[::2] << 4) | index[1::2]
    return output, scales
