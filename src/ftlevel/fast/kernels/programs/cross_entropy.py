"""Cross-entropy and its gradient: a program has a row of scores, which it reads twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ftlevel.fast.kernels.formulas import Pair

BLOCK = 4096
"""Scores that a program reads at once."""


@triton.jit
def _cross_entropy(
    s_ptr, target_ptr, loss_ptr, of_s_ptr, vocabulary, smoothing,
    SMOOTHS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin = row.to(tl.int64) * vocabulary
    target = tl.load(target_ptr + row)
    places = tl.arange(0, SIZE)
    top, total, plain = -3.0e38, 0.0, 0.0
    for at in range(0, vocabulary, SIZE):
        inside = at + places < vocabulary
        s = tl.load(s_ptr + begin + at + places, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(s, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(s - higher), axis=0)
        top = higher
        if SMOOTHS:
            plain += tl.sum(tl.where(inside, s, 0.0), axis=0)
    is_there = (target >= 0) & (target < vocabulary)
    wanted = tl.load(s_ptr + begin + target, mask=is_there, other=float("nan")).to(tl.float32)
    loss = top + tl.log(total) - wanted
    if SMOOTHS:
        loss += smoothing * (wanted - plain / vocabulary)
    tl.store(loss_ptr + row, loss)
    for at in range(0, vocabulary, SIZE):
        inside = at + places < vocabulary
        s = tl.load(s_ptr + begin + at + places, mask=inside, other=0.0).to(tl.float32)
        of_s = tl.exp(s - top) / total
        if SMOOTHS:
            of_s -= smoothing / vocabulary
        of_s = tl.where(at + places == target, of_s - (1.0 - smoothing), of_s)
        tl.store(of_s_ptr + begin + at + places, of_s.to(of_s_ptr.dtype.element_ty), mask=inside)


def cross_entropy(scores: torch.Tensor, targets: torch.Tensor, smoothing: float) -> Pair:
    """Return the losses (targets,) in float32, and the gradient, of contiguous scores."""
    losses = scores.new_empty(len(scores), dtype=torch.float32)
    gradient = torch.empty_like(scores)
    vocabulary = scores.shape[-1]
    _cross_entropy[(len(scores),)](
        scores, targets, losses, gradient, vocabulary, smoothing, SMOOTHS=smoothing > 0,
        SIZE=min(BLOCK, triton.next_power_of_2(vocabulary)), num_warps=8,
    )  # fmt: skip
    return losses, gradient
