"""Rotary embeddings of queries and keys in one kernel per direction, on GPUs that have it.

transformers' `apply_rotary_pos_emb` is replaced in each modeling module where it computes the
formula. The original runs for all arguments that the kernel does not support.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ftlevel.fast.kernels import TORCH, Formulas, Kernels, Pair

NAME = "apply_rotary_pos_emb"
"""Name of the function in transformers' modules."""


class _Rope(torch.autograd.Function):
    """Rotation that saves only the angles."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, formulas: Formulas
    ) -> Pair:
        """Return q′ and k′, (batch, tokens, heads, head_dim)."""
        ctx.save_for_backward(cos, sin)
        ctx.formulas = formulas
        return formulas.rope(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q and k."""
        parts = ctx.formulas.rope(of_q, of_k, *ctx.saved_tensors, backward=True)
        return *parts, None, None, None


class FusedRope:
    """Replaces the rotary embedding functions of `model` until `remove`, and has their `count`."""

    def __init__(self, model: nn.Module, kernels: Kernels) -> None:
        self._replaced: list[tuple[ModuleType, Callable[..., Any]]] = []
        classes = {kind for module in model.modules() for kind in type(module).__mro__}
        modules = {kind.__module__: sys.modules.get(kind.__module__) for kind in classes}
        for _, namespace in sorted(modules.items()):
            plain = getattr(namespace, NAME, None)
            if namespace is not None and plain is not None and computes_rope(plain):
                setattr(namespace, NAME, _Replacement(plain, kernels))
                self._replaced.append((namespace, plain))
        self.count = len(self._replaced)

    def remove(self) -> None:
        """Restore the functions."""
        for module, plain in self._replaced:
            setattr(module, NAME, plain)
        self._replaced.clear()


class _Replacement:
    """Computes the rotation by a kernel, or by `plain` where none is supported."""

    def __init__(self, plain: Callable[..., Any], kernels: Kernels) -> None:
        self._plain, self._kernels = plain, kernels

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **settings: Any
    ) -> Any:
        """Return q′ and k′ for q and k (batch, heads, tokens, head_dim)."""
        formulas: Formulas = TORCH
        if torch.is_grad_enabled() and not (others or settings) and _is_usual(q, k, cos, sin):
            heads = (q.shape[1], k.shape[1], q.shape[3])
            formulas = self._kernels.rope(heads, q.dtype, q.device.type)
        if formulas is TORCH:
            return self._plain(q, k, cos, sin, *others, **settings)
        rotated = _Rope.apply(  # type: ignore[no-untyped-call]  # torch's
            q.transpose(1, 2), k.transpose(1, 2), cos, sin, formulas
        )
        return tuple(part.transpose(1, 2) for part in rotated)


def _is_usual(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether all dtypes are equal and every element of a head is rotated."""
    if not q.dim() == k.dim() == 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    batch, _, tokens, width = q.shape
    angles = ((1, tokens, width), (batch, tokens, width))
    keys_fit = (k.shape[0], *k.shape[2:]) == (batch, tokens, width)
    one = {part.dtype for part in (q, k, cos, sin)}
    frozen = not (cos.requires_grad or sin.requires_grad)
    return keys_fit and tuple(cos.shape) in angles and len(one) == 1 and frozen and width % 2 == 0


def computes_rope(function: Any) -> bool:
    """Return whether `function` computes the formula, bit for bit in bfloat16."""
    if isinstance(function, _Replacement):
        return False  # of another fast step
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 8), (2, 3, 8))
    q, k, cos, sin = (torch.randn(s, generator=generator).to(torch.bfloat16) for s in shapes)
    expected = TORCH.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    try:
        rotated = function(q, k, cos, sin)
        return all(
            torch.equal(a, b.transpose(1, 2)) for a, b in zip(rotated, expected, strict=True)
        )
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
