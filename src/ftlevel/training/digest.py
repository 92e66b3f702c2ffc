"""Digests of tensors, made where they lie: the frozen weights of a run are those that were loaded.

    D = Σᵢ m(xᵢ + (i + 1) · φ)  mod 2⁶⁴,   m(z) = s(s(z, 32) · a, 29),   s(z, n) = z ⊕ (z >>> n)

over a tensor's bytes as 64-bit words xᵢ, with odd constants φ and a (those of SplitMix64: Steele,
Lea and Flood, 2014). m is one to one and looks random, so two tensors that differ have the same sum
by a chance of 2⁻⁶⁴. It tells faults, not forgeries; SHA-256 would bring every weight of a GPU to
the host first, and hash half a gigabyte a second there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from ftlevel.models.upstream.shards import own_part
from ftlevel.models.upstream.tensors import inner_tensors

_PHI = 0x9E3779B97F4A7C15 - 2**64
_FACTOR = 0xBF58476D1CE4E5B9 - 2**64
_SHIFTS = 32, 29

_CPU_WORDS = 1 << 15
"""Words of a piece: 256 KiB and two copies of it stay in a core's cache."""

_GPU_WORDS = 1 << 23
"""Words of a piece: 64 MiB keep a GPU busy for longer than it takes to launch what is done."""


@dataclass(frozen=True)
class Digest:
    """What is remembered of a tensor.

    Attributes:
        dtype: of its numbers.
        shape: of it.
        value: D of its bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    value: int


def digest_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, Digest]:
    """Return the digest of each tensor by its name; a device is waited for once.

    Of one that is shared out among processes it is that of this process's part.
    """
    held = [(name, own_part(tensor.detach())) for name, tensor in tensors]
    parts = [(name, tensor, _sum(tensor)) for name, tensor in held]
    if not parts:
        return {}
    values = torch.stack([value.cpu() for _, _, value in parts]).tolist()
    return {
        name: Digest(tensor.dtype, tuple(tensor.shape), value)
        for (name, tensor, _), value in zip(parts, values, strict=True)
    }


def base_name(name: str) -> str:
    """Return a parameter's name without what PEFT adds to it."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def digest(tensor: torch.Tensor) -> Digest:
    """Return the digest of one tensor."""
    return digest_tensors([("", tensor)])[""]


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return D (a scalar, int64), on the tensor's device."""
    if parts := inner_tensors(tensor):  # torchao's: several tensors under one name
        return _sum(torch.stack([_sum(part).cpu() for part in parts]))
    data = tensor.contiguous().view(-1).view(torch.uint8)
    words = _CPU_WORDS if data.device.type == "cpu" else _GPU_WORDS
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, len(data), 8 * words):
        total += _sum_piece(data[start : start + 8 * words], start // 8)
    return total


def _sum_piece(piece: torch.Tensor, first: int) -> torch.Tensor:
    """Return Σ m of the words of `piece`, bytes of a tensor whose word `first` it begins with."""
    if len(piece) % 8:
        piece = torch.cat([piece, piece.new_zeros(8 - len(piece) % 8)])
    if piece.storage_offset() % 8:
        piece = piece.clone()
    x = piece.view(torch.int64)
    z = x + _keys(len(x), piece.device)
    z.add_(_wrapped(first * _PHI))
    for shift, factor in zip(_SHIFTS, (_FACTOR, 1), strict=True):
        high = (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        z.bitwise_xor_(high)
        if factor != 1:
            z.mul_(factor)
    return z.sum()


@lru_cache(maxsize=4)
def _keys(count: int, device: torch.device) -> torch.Tensor:
    """Return (i + 1) · φ for the first `count` words."""
    return torch.arange(1, count + 1, device=device).mul_(_PHI)


def _wrapped(number: int) -> int:
    """Return `number` as 64 bits hold it, signed."""
    return (number + 2**63) % 2**64 - 2**63
