"""Norms and GLUs: a program of a norm has a row, one of a GLU a block of numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ftlevel.fast.kernels.formulas import Pair
from ftlevel.fast.kernels.programs.rounding import rounded

BLOCK = 1024
"""Numbers of a program of a GLU."""

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _normalized(x, rho, w, x_ptr, IN_FLOAT32: tl.constexpr):
    if IN_FLOAT32:
        return x * rho * w
    return rounded(x * rho, x_ptr) * w


@triton.jit
def _norm(
    x_ptr, w_ptr, y_ptr, rho_ptr, width, eps,
    IN_FLOAT32: tl.constexpr, HAS_RHO: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    places = tl.arange(0, SIZE)
    inside = places < width
    begin = row.to(tl.int64) * width
    x = tl.load(x_ptr + begin + places, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if HAS_RHO:
        rho = tl.load(rho_ptr + row)
    else:
        rho = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
        tl.store(rho_ptr + row, rho)
    y = _normalized(x, rho, w, x_ptr, IN_FLOAT32)
    tl.store(y_ptr + begin + places, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(g_ptr, x_ptr, w_ptr, rho_ptr, of_x_ptr, width, SIZE: tl.constexpr):
    row = tl.program_id(0)
    places = tl.arange(0, SIZE)
    inside = places < width
    begin = row.to(tl.int64) * width
    g = tl.load(g_ptr + begin + places, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + begin + places, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + places, mask=inside, other=0.0).to(tl.float32)
    rho = tl.load(rho_ptr + row)
    normed, of_normed = x * rho, g * w
    along = tl.sum(of_normed * normed, axis=0) / width
    of_x = (of_normed - normed * along) * rho
    tl.store(of_x_ptr + begin + places, of_x.to(of_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """Return a(x) and a′(x)."""
    if KIND == 0:  # x σ(x)
        share = tl.sigmoid(x)
        return x * share, share * (1.0 + x * (1.0 - share))
    if KIND == 1:  # x Φ(x)
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * share, share + x * density
    # x (1 + tanh z) / 2 = x σ(2z), which loses no digits where x is far below zero
    share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * share, share + x * share * (1.0 - share) * slope


@triton.jit
def _glu(gate_ptr, up_ptr, y_ptr, count, KIND: tl.constexpr, SIZE: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = places < count
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=inside, other=0.0).to(tl.float32)
    active, _ = _activated(gate, KIND)
    y = rounded(active, gate_ptr) * up
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _glu_backward(
    g_ptr, gate_ptr, up_ptr, of_gate_ptr, of_up_ptr, count,
    KIND: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = places < count
    g = tl.load(g_ptr + places, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=inside, other=0.0).to(tl.float32)
    active, slope = _activated(gate, KIND)
    of_gate = rounded(g * up, gate_ptr) * slope
    of_up = rounded(active, gate_ptr) * g
    tl.store(of_gate_ptr + places, of_gate.to(of_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(of_up_ptr + places, of_up.to(of_up_ptr.dtype.element_ty), mask=inside)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Pair:
    """Return y and ρ, of contiguous x (…, hidden)."""
    y = torch.empty_like(x)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _launch_norm(x, weight, y, scale, eps, has_scale=False)
    return y, scale


def renorm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return y from ρ."""
    y = torch.empty_like(x)
    _launch_norm(x, weight, y, scale, 0.0, has_scale=True)
    return y


def _launch_norm(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, eps: float,
    *, has_scale: bool,
) -> None:  # fmt: skip
    _norm[(scale.numel(),)](
        x, weight, y, scale, x.shape[-1], eps, IN_FLOAT32=weight.dtype == torch.float32,
        HAS_RHO=has_scale, SIZE=triton.next_power_of_2(x.shape[-1]), num_warps=_warps(x),
    )  # fmt: skip


def norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Return ∂L/∂x, of contiguous tensors."""
    of_x = torch.empty_like(x)
    _norm_backward[(scale.numel(),)](
        gradient, x, weight, scale, of_x, x.shape[-1],
        SIZE=triton.next_power_of_2(x.shape[-1]), num_warps=_warps(x),
    )  # fmt: skip
    return of_x


def _warps(x: torch.Tensor) -> int:
    """Return the warps of a program that has a row of `x`: some 16 numbers a thread."""
    return min(16, max(1, triton.next_power_of_2(x.shape[-1]) // 512))


def glu(kind: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return y, of contiguous tensors of one shape."""
    y = torch.empty_like(gate)
    blocks = (triton.cdiv(gate.numel(), BLOCK),)
    _glu[blocks](gate, up, y, gate.numel(), KIND=KINDS[kind], SIZE=BLOCK)
    return y


def glu_backward(kind: str, gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Pair:
    """Return ∂L/∂g and ∂L/∂u, of contiguous tensors of one shape."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _glu_backward[(triton.cdiv(gate.numel(), BLOCK),)](
        gradient, gate, up, of_gate, of_up, gate.numel(), KIND=KINDS[kind], SIZE=BLOCK
    )
    return of_gate, of_up
