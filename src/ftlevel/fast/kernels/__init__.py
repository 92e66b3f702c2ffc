"""Triton kernels for NVIDIA GPUs, used where they are verified and faster.

`Kernels` compares each kernel with torch's operations on random values of the run's width and
precision, forward and backward. Without Triton, or if it cannot compile, torch's operations are
used.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftlevel.fast.kernels.formulas import TORCH, Formulas
from ftlevel.fast.kernels.operators import TritonFormulas

TOKENS = 2048
"""Tokens of a comparison."""

TARGETS = 256
"""Targets of a comparison of losses."""

WIDEST = 32_768
"""Maximum row width of a program."""

ROUNDINGS = 4
"""Tolerance in units in the last place, for another order of sums."""

_chosen: dict[str, Formulas] = {}

Way = Callable[[Formulas], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Kernels:
    """Chooses the implementation of each formula; results are cached per process."""

    allowed: bool = True

    def norm(self, width: int, weight: torch.dtype, dtype: torch.dtype, device: str) -> Formulas:
        """Return the implementation of norms; `weight` is the dtype of the weight's product."""
        serves = width <= WIDEST and self._can_serve(device, dtype)
        return choose_norm(width, weight, dtype, device) if serves else TORCH

    def glu(self, kind: str, width: int, dtype: torch.dtype, device: str) -> Formulas:
        """Return the implementation of GLUs with the activation `kind`."""
        return choose_glu(kind, width, dtype, device) if self._can_serve(device, dtype) else TORCH

    def rope(self, heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> Formulas:
        """Return the implementation of RoPE; `heads` is (query heads, key heads, head_dim)."""
        serves = max(heads[:2]) * heads[2] <= WIDEST and self._can_serve(device, dtype)
        return choose_rope(heads, dtype, device) if serves else TORCH

    def cross_entropy(self, vocabulary: int, dtype: torch.dtype, device: str) -> Formulas:
        """Return the implementation of cross-entropy and its gradient over a `vocabulary`."""
        serves = self._can_serve(device, dtype)
        return choose_cross_entropy(vocabulary, dtype, device) if serves else TORCH

    def _can_serve(self, device: str, dtype: torch.dtype) -> bool:
        return self.allowed and supports_triton(device, dtype)


NO_KERNELS = Kernels(allowed=False)
"""Uses torch's operations for everything."""


@functools.cache
def choose_norm(width: int, weight: torch.dtype, dtype: torch.dtype, device: str) -> Formulas:
    """Return the faster implementation of norms, see `Kernels.norm`."""
    x, gradient = (_draw(seed, (TOKENS, width), dtype, device) for seed in (0, 1))
    w = _draw(2, (width,), torch.float32, device).to(weight)

    def compute(formulas: Formulas) -> Sequence[torch.Tensor]:
        y, scale = formulas.norm(x, w, 1e-6)
        again = formulas.renorm(x, w, scale)
        return y, scale, again, formulas.norm_backward(gradient, x, w, scale)

    return _choose_faster(f"norm {width} wide in {dtype}", compute, device)


@functools.cache
def choose_glu(kind: str, width: int, dtype: torch.dtype, device: str) -> Formulas:
    """Return the faster implementation of GLUs, see `Kernels.glu`."""
    gate, up, gradient = (_draw(seed, (TOKENS, width), dtype, device) for seed in range(3))

    def compute(formulas: Formulas) -> Sequence[torch.Tensor]:
        return formulas.glu(kind, gate, up), *formulas.glu_backward(kind, gradient, gate, up)

    return _choose_faster(f"{kind} GLU {width} wide in {dtype}", compute, device)


@functools.cache
def choose_rope(heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> Formulas:
    """Return the faster implementation of rotary embeddings, see `Kernels.rope`."""
    q_heads, k_heads, width = heads
    q = _draw(0, (1, TOKENS, q_heads, width), dtype, device)
    k = _draw(1, (1, TOKENS, k_heads, width), dtype, device)
    angles = _draw(2, (1, TOKENS, width), torch.float32, device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def compute(formulas: Formulas) -> Sequence[torch.Tensor]:
        there = formulas.rope(q, k, cos, sin)
        return *there, *formulas.rope(q, k, cos, sin, backward=True)

    return _choose_faster(
        f"RoPE of {q_heads} and {k_heads} heads of {width} in {dtype}", compute, device
    )


@functools.cache
def choose_cross_entropy(vocabulary: int, dtype: torch.dtype, device: str) -> Formulas:
    """Return the faster implementation of cross-entropy, see `Kernels.cross_entropy`."""
    scores = 4 * _draw(0, (TARGETS, vocabulary), dtype, device)
    targets = scores.float().argmax(-1)
    targets[::2] = vocabulary - 1  # a likely token, and the last

    def compute(formulas: Formulas) -> Sequence[torch.Tensor]:
        made = [formulas.cross_entropy(scores, targets, smoothing) for smoothing in (0.0, 0.1)]
        return [part for loss, gradient in made for part in (loss, gradient.to(dtype))]

    return _choose_faster(f"loss over {vocabulary} scores in {dtype}", compute, device)


def describe_choices() -> dict[str, bool]:
    """Return description → whether kernels are used, for each comparison in this process."""
    return {words: formulas is not TORCH for words, formulas in _chosen.items()}


def supports_triton(device: str, dtype: torch.dtype) -> bool:
    """Return whether Triton is available and supports the device and dtype."""
    return (
        device == "cuda"
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
    )


def agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two results are equal up to `ROUNDINGS`."""
    bound = ROUNDINGS * torch.finfo(one.dtype).eps
    a, b = one.to(torch.float32), other.to(torch.float32)
    size = float(a.square().mean().sqrt())
    return one.dtype == other.dtype and torch.allclose(a, b, rtol=bound, atol=bound * size)


def _choose_faster(words: str, compute: Way, device: str) -> Formulas:
    """Return the kernels if they match torch's operations and are faster."""
    ours = TritonFormulas()
    _chosen[words] = TORCH
    try:
        made = compute(ours)
    except Exception:  # noqa: BLE001 - whatever a compiler says of a card: the other way is there
        return TORCH
    is_same = all(agree(a, b) for a, b in zip(compute(TORCH), made, strict=True))
    if is_same and time(compute, ours, device) < time(compute, TORCH, device):
        _chosen[words] = ours
    return _chosen[words]


def time(compute: Way, formulas: Formulas, device: str) -> float:
    """Return the milliseconds of `compute` on a GPU, the best of five runs."""
    best = float("inf")
    for _ in range(5):
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        compute(formulas)
        end.record()
        torch.cuda.synchronize(device)
        best = min(best, float(begin.elapsed_time(end)))
    return best


def _draw(seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return normally distributed values, independent of the global generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)
