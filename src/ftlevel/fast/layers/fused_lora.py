"""The fused function: y = x Wᵀ + b + s · d Aᵀ Bᵀ, with d = dropout(x), and its backward at once.

W is frozen, A is (r, in), B is (out, r). With g = ∂L/∂y, both (tokens, out), h = s · A dᵀ and
u = s · Bᵀ gᵀ, which the products multiply by s before they are rounded:

    ∂L/∂x = g W    ∂L/∂d = uᵀ A    ∂L/∂A = u d    ∂L/∂B = (h g)ᵀ    ∂L/∂b = Σ g

The update comes first, and the base's product is added to it: so the sum is rounded once, where the
other order rounds the base's part and then the sum, and the large product reads the small one while
it computes. Without dropout d is x, and ∂L/∂x is made alike. All that is r wide is held as
(r, tokens): with r as the rows, oneDNN and MKL run these products at 85 to 120 GFLOP/s a core in
bfloat16 where (tokens, r) costs up to four times as much (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ftlevel.fast.layers.recompute import Recomputation
from ftlevel.models.upstream.tensors import (
    cast_together,
    is_in_backward,
    new_shape,
)


class FusedLoraFunction(torch.autograd.Function):
    """A frozen linear and its low-rank update. See the module for the formulas."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        bias: torch.Tensor | None,
        weight: Callable[[], torch.Tensor],
        scaling: float,
        recomputation: tuple[Recomputation, tuple[torch.Tensor, ...]] | None = None,
        layer: Any = None,
    ) -> torch.Tensor:
        """Return y, (…, out), in x's dtype.

        Args:
            ctx: autograd's.
            x: input in the dtype to compute in, (…, in).
            dropped: dropout(x), or None without dropout.
            a: (r, in) in any float dtype; its gradient has the same.
            b: (out, r), likewise.
            bias: of the base, (out,), or None.
            weight: gives W, (out, in), in x's dtype; asked once here and once in backward, so that
                a dequantized weight is not held between them.
            scaling: s.
            recomputation: how x is recomputed and from what, so that it need not be kept; or None.
            layer: of which this is the forward; where it ends a block that is computed again, y is
                NaN, which nobody reads.
        """
        rows = x.reshape(-1, x.shape[-1])
        source = rows if dropped is None else dropped.reshape(rows.shape)
        down, up = cast_together([a, b], x.dtype)
        inner = _scaled(down, source.t(), scaling)
        if layer is not None and layer.ends_a_block and is_in_backward():
            y = x.new_full((), torch.nan).expand(len(rows), len(up))
        else:
            parts = (inner.t(), up.t())
            y = torch.mm(*parts) if bias is None else torch.addmm(bias.to(x.dtype), *parts)
            y.addmm_(rows, weight().t())
        kept: tuple[torch.Tensor, ...] = (source,)
        ctx.recomputation = None
        if recomputation is not None and dropped is None:
            ctx.recomputation, kept = recomputation
            ctx.recomputation.enter()
        ctx.save_for_backward(inner, down, up, *kept)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        ctx.dtypes = (a.dtype, b.dtype, None if bias is None else bias.dtype)
        ctx.has_dropout, ctx.layer = dropped is not None, layer
        # Not a view: what a function returns as one must not be written to, and Longformer, LED and
        # DeBERTa scale their queries in place.
        shaped: torch.Tensor = new_shape(y, [*x.shape[:-1], y.shape[-1]])
        return shaped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of forward's arguments."""
        inner, down, up, *kept = ctx.saved_tensors
        for_x, for_dropped, for_a, for_b, for_bias = ctx.needs_input_grad[:5]
        dtype_a, dtype_b, dtype_bias = ctx.dtypes
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_dropped = grad_a = grad_b = grad_bias = None
        through_a = _scaled(up.t(), g.t(), ctx.scaling)
        if for_x:
            if ctx.has_dropout:
                grad_x = g @ ctx.weight()
            else:
                grad_x = (through_a.t() @ down).addmm_(g, ctx.weight())
            grad_x = grad_x.view(ctx.shape)
        if for_dropped:
            grad_dropped = (through_a.t() @ down).view(ctx.shape)
        if for_a:
            source = kept[0] if ctx.recomputation is None else ctx.recomputation.make(*kept)
            source = source.reshape(-1, source.shape[-1])
            grad_a = _product(through_a, source, dtype_a)
        if for_b:
            grad_b = _product(inner, g, dtype_b, transposed=True)
        if for_bias:
            grad_bias = g.sum(0, dtype=dtype_bias)
        return grad_x, grad_dropped, grad_a, grad_b, grad_bias, None, None, None, None


def _scaled(one: torch.Tensor, other: torch.Tensor, factor: float) -> torch.Tensor:
    """Return `factor` times the matrix product."""
    if factor == 1.0:
        return one @ other
    product = one.new_empty(one.shape[0], other.shape[1])
    return product.addmm_(one, other, beta=0, alpha=factor)


def _product(
    one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype, *, transposed: bool = False
) -> torch.Tensor:
    """Return the matrix product, or what it is `transposed`, in `dtype`.

    An NVIDIA GPU writes it as it was summed, in float32, and either way round. (`addmm` would scale
    it, too, but what torch 2.8 asks of its arguments is not what 2.13 does.)
    """
    lower = one.dtype in (torch.bfloat16, torch.float16)
    if one.is_cuda and lower and dtype == torch.float32 and torch.version.hip is None:
        one, other = (other.t(), one.t()) if transposed else (one, other)
        return torch.mm(one, other, out_dtype=dtype)
    product = (one @ other).to(dtype)
    return product.t() if transposed else product
