"""Triton kernels of norms and GLUs on an NVIDIA GPU, used where they prove themselves.

`choose_norm` and `choose_glu` compute the formulas both ways on random numbers of the run's own
width and precision, on the GPU that it runs on: a kernel is used where it gives the same numbers to
rounding, forward and backward, and is faster. Where Triton is missing, or does not compile, torch's
operations compute as ever.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ftlevel.fast.layers.formulas import TORCH, Formulas
from ftlevel.fast.layers.kernels.operators import TritonFormulas

TOKENS = 2048
"""Of the comparison."""

WIDEST = 32_768
"""Numbers of a row that one program can have."""

ROUNDINGS = 4
"""Units in the last place by which numbers may differ that were added in another order."""

_chosen: dict[str, Formulas] = {}

Way = Callable[[Formulas], Sequence[torch.Tensor]]


@functools.cache
def choose_norm(width: int, weight: torch.dtype, dtype: torch.dtype, device: str) -> Formulas:
    """Return what computes norms of `width` whose weight multiplies in `weight`, on `device`."""
    if width > WIDEST or not can_serve(device, dtype):
        return TORCH
    x, gradient = (_draw(seed, width, dtype, device) for seed in (0, 1))
    w = _draw(2, width, torch.float32, device)[0].to(weight)

    def compute(formulas: Formulas) -> Sequence[torch.Tensor]:
        y, scale = formulas.norm(x, w, 1e-6)
        again = formulas.renorm(x, w, scale)
        return y, scale, again, formulas.norm_backward(gradient, x, w, scale)

    return _better(f"norm {width} wide in {dtype}", compute, device)


@functools.cache
def choose_glu(kind: str, width: int, dtype: torch.dtype, device: str) -> Formulas:
    """Return what computes GLUs of `width` with the activation `kind`, on `device`."""
    if not can_serve(device, dtype):
        return TORCH
    gate, up, gradient = (_draw(seed, width, dtype, device) for seed in range(3))

    def compute(formulas: Formulas) -> Sequence[torch.Tensor]:
        return formulas.glu(kind, gate, up), *formulas.glu_backward(kind, gradient, gate, up)

    return _better(f"{kind} GLU {width} wide in {dtype}", compute, device)


def describe_choices() -> dict[str, bool]:
    """Return what was compared in this process, in words → whether kernels are used for it."""
    return {words: formulas is not TORCH for words, formulas in _chosen.items()}


def can_serve(device: str, dtype: torch.dtype) -> bool:
    """Whether there is Triton for a GPU, and the precision is one that kernels compute from."""
    return (
        device == "cuda"
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
    )


def agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are the same to some roundings of their precision."""
    bound = ROUNDINGS * torch.finfo(one.dtype).eps
    a, b = one.to(torch.float32), other.to(torch.float32)
    size = float(a.square().mean().sqrt())
    return one.dtype == other.dtype and torch.allclose(a, b, rtol=bound, atol=bound * size)


def _better(words: str, compute: Way, device: str) -> Formulas:
    """Return the kernels where they give the same as torch's operations, and sooner."""
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
    """Return the milliseconds that `compute` takes on a GPU, the best of some."""
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


def _draw(seed: int, width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return numbers around 0, (TOKENS, width), that are the same whatever was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, width, generator=generator).to(device, dtype)
