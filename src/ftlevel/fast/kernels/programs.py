"""Triton kernels of `kernels.TorchBackend`; import only where Triton is installed.

A Triton program computes a row of a norm, a block of a GLU, a row of logits (read twice), or RoPE
of a token in all heads. Arithmetic is in float32, rounded where torch would store a tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftlevel.fast.kernels import Pair

VOCABULARY_BLOCK = 4096
"""Logits that a program reads at once."""


@triton.jit
def _cross_entropy(
    s_ptr, target_ptr, loss_ptr, of_s_ptr, vocabulary, smoothing,
    SMOOTHS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    offset = row.to(tl.int64) * vocabulary
    target = tl.load(target_ptr + row)
    columns = tl.arange(0, SIZE)
    top, total, plain = -3.0e38, 0.0, 0.0
    for at in range(0, vocabulary, SIZE):
        inside = at + columns < vocabulary
        s = tl.load(s_ptr + offset + at + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(s, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(s - higher), axis=0)
        top = higher
        if SMOOTHS:
            plain += tl.sum(tl.where(inside, s, 0.0), axis=0)
    is_valid = (target >= 0) & (target < vocabulary)
    target_logit = tl.load(s_ptr + offset + target, mask=is_valid, other=float("nan")).to(
        tl.float32
    )
    loss = top + tl.log(total) - target_logit
    if SMOOTHS:
        loss += smoothing * (target_logit - plain / vocabulary)
    tl.store(loss_ptr + row, loss)
    for at in range(0, vocabulary, SIZE):
        inside = at + columns < vocabulary
        s = tl.load(s_ptr + offset + at + columns, mask=inside, other=0.0).to(tl.float32)
        of_s = tl.exp(s - top) / total
        if SMOOTHS:
            of_s -= smoothing / vocabulary
        of_s = tl.where(at + columns == target, of_s - (1.0 - smoothing), of_s)
        tl.store(of_s_ptr + offset + at + columns, of_s.to(of_s_ptr.dtype.element_ty), mask=inside)


def cross_entropy(scores: Tensor, targets: Tensor, smoothing: float) -> Pair:
    """Returns the losses (targets,) in float32, and the gradient of contiguous logits."""
    losses = scores.new_empty(len(scores), dtype=torch.float32)
    gradient = torch.empty_like(scores)
    vocabulary = scores.shape[-1]
    _cross_entropy[(len(scores),)](
        scores, targets, losses, gradient, vocabulary, smoothing, SMOOTHS=smoothing > 0,
        SIZE=min(VOCABULARY_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=8,
    )  # fmt: skip
    return losses, gradient


@triton.jit
def rounded(value, like):
    """Round `value` to the dtype that `like` points to; the result is float32."""
    return value.to(like.dtype.element_ty).to(tl.float32)


BLOCK = 1024
"""Values of a GLU per program."""

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
    columns = tl.arange(0, SIZE)
    inside = columns < width
    offset = row.to(tl.int64) * width
    x = tl.load(x_ptr + offset + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RHO:
        rho = tl.load(rho_ptr + row)
    else:
        rho = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
        tl.store(rho_ptr + row, rho)
    y = _normalized(x, rho, w, x_ptr, IN_FLOAT32)
    tl.store(y_ptr + offset + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(g_ptr, x_ptr, w_ptr, rho_ptr, of_x_ptr, width, SIZE: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, SIZE)
    inside = columns < width
    offset = row.to(tl.int64) * width
    g = tl.load(g_ptr + offset + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offset + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    rho = tl.load(rho_ptr + row)
    normed, of_normed = x * rho, g * w
    along = tl.sum(of_normed * normed, axis=0) / width
    of_x = (of_normed - normed * along) * rho
    tl.store(of_x_ptr + offset + columns, of_x.to(of_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """Returns activation a(x) and derivative a′(x); `KIND` is a value of `KINDS`."""
    if KIND == 0:  # x σ(x)
        share = tl.sigmoid(x)
        return x * share, share * (1.0 + x * (1.0 - share))
    if KIND == 1:  # x Φ(x)
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * share, share + x * density
    # x (1 + tanh z) / 2 = x σ(2z), which stays precise for large negative x
    share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return x * share, share + x * share * (1.0 - share) * slope


@triton.jit
def _glu(gate_ptr, up_ptr, y_ptr, count, KIND: tl.constexpr, SIZE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < count
    gate = tl.load(gate_ptr + index, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + index, mask=inside, other=0.0).to(tl.float32)
    active, _ = _activated(gate, KIND)
    y = rounded(active, gate_ptr) * up
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _glu_backward(
    g_ptr, gate_ptr, up_ptr, of_gate_ptr, of_up_ptr, count, KIND: tl.constexpr, SIZE: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = index < count
    g = tl.load(g_ptr + index, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + index, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + index, mask=inside, other=0.0).to(tl.float32)
    active, slope = _activated(gate, KIND)
    of_gate = rounded(g * up, gate_ptr) * slope
    of_up = rounded(active, gate_ptr) * g
    tl.store(of_gate_ptr + index, of_gate.to(of_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(of_up_ptr + index, of_up.to(of_up_ptr.dtype.element_ty), mask=inside)


def norm(x: Tensor, weight: Tensor, eps: float) -> Pair:
    """Returns the RMSNorm of contiguous x (…, hidden), and ρ = 1 / RMS(x)."""
    y = torch.empty_like(x)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _launch_norm(x, weight, y, scale, eps, has_scale=False)
    return y, scale


def renorm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Returns the RMSNorm output recomputed from x and ρ = 1 / RMS(x)."""
    y = torch.empty_like(x)
    _launch_norm(x, weight, y, scale, 0.0, has_scale=True)
    return y


def _launch_norm(
    x: Tensor, weight: Tensor, y: Tensor, scale: Tensor, eps: float, *, has_scale: bool
) -> None:
    _norm[(scale.numel(),)](
        x, weight, y, scale, x.shape[-1], eps, IN_FLOAT32=weight.dtype == torch.float32,
        HAS_RHO=has_scale, SIZE=triton.next_power_of_2(x.shape[-1]), num_warps=_warps(x),
    )  # fmt: skip


def norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Returns the RMSNorm's ∂L/∂x for contiguous tensors."""
    of_x = torch.empty_like(x)
    _norm_backward[(scale.numel(),)](
        gradient, x, weight, scale, of_x, x.shape[-1],
        SIZE=triton.next_power_of_2(x.shape[-1]), num_warps=_warps(x),
    )  # fmt: skip
    return of_x


def _warps(x: Tensor) -> int:
    return min(16, max(1, triton.next_power_of_2(x.shape[-1]) // 512))


def glu(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    """Returns a(gate) ∘ up for contiguous tensors of one shape; `kind` is a key of `KINDS`."""
    y = torch.empty_like(gate)
    blocks = (triton.cdiv(gate.numel(), BLOCK),)
    _glu[blocks](gate, up, y, gate.numel(), KIND=KINDS[kind], SIZE=BLOCK)
    return y


def glu_backward(kind: str, gradient: Tensor, gate: Tensor, up: Tensor) -> Pair:
    """Returns the gradients of `gate` and `up`, for contiguous tensors of one shape."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _glu_backward[(triton.cdiv(gate.numel(), BLOCK),)](
        gradient, gate, up, of_gate, of_up, gate.numel(), KIND=KINDS[kind], SIZE=BLOCK
    )
    return of_gate, of_up


@triton.jit
def _rotate(
    x_ptr, y_ptr, token, heads, half, cos_1, cos_2, sin_1, sin_2,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    at = (token.to(tl.int64) * heads + head) * 2 * half + column
    one = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(x_ptr + at + half, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        y_1 = rounded(one * cos_1, x_ptr) + rounded(two * sin_2, x_ptr)
        y_2 = rounded(two * cos_2, x_ptr) - rounded(one * sin_1, x_ptr)
    else:
        y_1 = rounded(one * cos_1, x_ptr) - rounded(two * sin_1, x_ptr)
        y_2 = rounded(two * cos_2, x_ptr) + rounded(one * sin_2, x_ptr)
    tl.store(y_ptr + at, y_1.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + at + half, y_2.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope(
    q_ptr, k_ptr, cos_ptr, sin_ptr, of_q_ptr, of_k_ptr, rows, q_heads, k_heads, half,
    BACKWARD: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.arange(0, HALF)[None, :]
    inside = column < half
    at = (token % rows).to(tl.int64) * 2 * half + column
    cos_1 = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + at + half, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + at + half, mask=inside, other=0.0).to(tl.float32)
    _rotate(
        q_ptr, of_q_ptr, token, q_heads, half, cos_1, cos_2, sin_1, sin_2, BACKWARD, Q_HEADS, HALF
    )
    _rotate(
        k_ptr, of_k_ptr, token, k_heads, half, cos_1, cos_2, sin_1, sin_2, BACKWARD, K_HEADS, HALF
    )


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Pair:
    """Returns contiguous q and k rotated; with `backward`, gradients are rotated back."""
    of_q, of_k = torch.empty_like(q), torch.empty_like(k)
    batch, tokens, heads, width = q.shape
    size = triton.next_power_of_2
    _rope[(batch * tokens,)](
        q, k, cos, sin, of_q, of_k, cos.numel() // width, heads, k.shape[2], width // 2,
        BACKWARD=backward, Q_HEADS=size(heads), K_HEADS=size(k.shape[2]), HALF=size(width // 2),
    )  # fmt: skip
    return of_q, of_k
