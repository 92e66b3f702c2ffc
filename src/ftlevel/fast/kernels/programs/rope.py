"""Rotary embeddings of queries and keys: a program has a token, with all of its heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ftlevel.fast.kernels.formulas import Pair
from ftlevel.fast.kernels.programs.rounding import rounded


@triton.jit
def _turn(
    x_ptr, y_ptr, token, heads, half, cos_1, cos_2, sin_1, sin_2,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head, place = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (place < half)
    at = (token.to(tl.int64) * heads + head) * 2 * half + place
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
    q_ptr, k_ptr, cos_ptr, sin_ptr, of_q_ptr, of_k_ptr, places, q_heads, k_heads, half,
    BACKWARD: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    place = tl.arange(0, HALF)[None, :]
    inside = place < half
    at = (token % places).to(tl.int64) * 2 * half + place
    cos_1 = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + at + half, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + at + half, mask=inside, other=0.0).to(tl.float32)
    _turn(q_ptr, of_q_ptr, token, q_heads, half, cos_1, cos_2, sin_1, sin_2,
          BACKWARD, Q_HEADS, HALF)  # fmt: skip
    _turn(k_ptr, of_k_ptr, token, k_heads, half, cos_1, cos_2, sin_1, sin_2,
          BACKWARD, K_HEADS, HALF)  # fmt: skip


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool
) -> Pair:
    """Return q′ and k′, or with `backward` the gradients of q and k, of contiguous tensors."""
    of_q, of_k = torch.empty_like(q), torch.empty_like(k)
    batch, tokens, heads, width = q.shape
    size = triton.next_power_of_2
    _rope[(batch * tokens,)](
        q, k, cos, sin, of_q, of_k, cos.numel() // width, heads, k.shape[2], width // 2,
        BACKWARD=backward, Q_HEADS=size(heads), K_HEADS=size(k.shape[2]), HALF=size(width // 2),
    )  # fmt: skip
    return of_q, of_k
