"""Formulas of the fused operations, in torch's operations.

    norm    y = w ∘ x̂,  x̂ = x · ρ,  ρ = (mean x² + ε)^−½
            ∂L/∂x = ρ · (d − x̂ · mean(d ∘ x̂)),  d = w ∘ ∂L/∂y
    GLU     y = a(g) ∘ u
            ∂L/∂g = a′(g) ∘ u ∘ ∂L/∂y,  ∂L/∂u = a(g) ∘ ∂L/∂y
    RoPE    q′ = q ∘ cos + J q ∘ sin,  J (q₁, q₂) = (−q₂, q₁) on the halves of a head; k alike
            ∂L/∂q = cos ∘ ∂L/∂q′ + Jᵀ (sin ∘ ∂L/∂q′)
    loss    log Σⱼ exp sⱼ − (1 − ε) s_y − ε mean s,  of labels smoothed by ε
            ∂L/∂s = softmax s − (1 − ε) onehot y − ε / vocabulary

x and y are (…, hidden), g and u (…, intermediate), ρ is (…, 1) in float32. q and k are (batch,
tokens, heads, head_dim), cos and sin (batch or 1, tokens, head_dim), s is (targets, vocabulary).
The dtype of w is the precision of its product: float32 or that of x. `kernels.programs` has the
kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional

from ftlevel.models.upstream.tensors import gelu_backward, silu_backward

Backward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]

ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Backward]] = {
    "silu": (functional.silu, silu_backward),
    "gelu": (functional.gelu, gelu_backward),
    "gelu_tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda g, x: gelu_backward(g, x, approximate="tanh"),
    ),
}
"""Kind → a, and (∂L/∂a, g) → ∂L/∂g."""


class Formulas(Protocol):
    """An implementation of the formulas."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Pair:
        """Return y and ρ."""

    def renorm(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return y again, bit for bit, from ρ."""

    def norm_backward(
        self, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Return ∂L/∂x."""

    def glu(self, kind: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return y; `kind` is a key of `ACTIVATIONS`."""

    def glu_backward(
        self, kind: str, gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> Pair:
        """Return ∂L/∂g and ∂L/∂u."""

    def rope(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        backward: bool = False,
    ) -> Pair:
        """Return q′ and k′, or with `backward` the gradients of q and k from those of q′ and k′."""

    def cross_entropy(self, scores: torch.Tensor, targets: torch.Tensor, smoothing: float) -> Pair:
        """Return the losses in float32, and their gradient in float32 or the dtype of `scores`."""


class TorchFormulas:
    """Implementation in torch's operations, for any device."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Pair:
        """Return y and ρ."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return _normalize(exact, weight, scale, x.dtype), scale

    def renorm(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return y again, bit for bit, from ρ."""
        return _normalize(x.to(scale.dtype), weight, scale, x.dtype)

    def norm_backward(
        self, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Return ∂L/∂x."""
        normed = x.to(scale.dtype) * scale
        of_normed = gradient.to(scale.dtype) * weight.to(scale.dtype)
        along = (of_normed * normed).mean(-1, keepdim=True)
        return of_normed.sub_(normed.mul_(along)).mul_(scale).to(x.dtype)

    def glu(self, kind: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return y."""
        return ACTIVATIONS[kind][0](gate).mul_(up)

    def glu_backward(
        self, kind: str, gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> Pair:
        """Return ∂L/∂g and ∂L/∂u."""
        activate, of_gate = ACTIVATIONS[kind]
        return of_gate(gradient * up, gate), activate(gate).mul_(gradient)

    def rope(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        backward: bool = False,
    ) -> Pair:
        """Return q′ and k′, or with `backward` the gradients of q and k from those of q′ and k′."""
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        if backward:
            return q * cos - _turn(q * sin), k * cos - _turn(k * sin)
        return q * cos + _turn(q) * sin, k * cos + _turn(k) * sin

    def cross_entropy(self, scores: torch.Tensor, targets: torch.Tensor, smoothing: float) -> Pair:
        """Return the losses, and their gradient, in float32.

        The largest probability p gives the normalizer cheaply: log Σⱼ exp sⱼ = max s − log max p.
        """
        exact = scores.float()
        chosen = exact.gather(-1, targets[:, None])[:, 0]
        probabilities = torch.softmax(exact, -1)
        normalizer = exact.amax(-1) - probabilities.amax(-1).log()
        ones = probabilities.new_full((len(targets), 1), smoothing - 1.0)
        if smoothing:
            chosen = (1 - smoothing) * chosen + smoothing * exact.mean(-1)
            probabilities -= smoothing / exact.shape[-1]
        return normalizer - chosen, probabilities.scatter_add_(-1, targets[:, None], ones)


def _turn(x: torch.Tensor) -> torch.Tensor:
    """Return J x."""
    one, two = x.chunk(2, -1)
    return torch.cat((-two, one), -1)


def _normalize(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return w ∘ x · ρ in `dtype` for x in float32."""
    normed = x * scale
    if weight.dtype == scale.dtype:
        return normed.mul_(weight).to(dtype)
    return normed.to(dtype).mul_(weight)


TORCH = TorchFormulas()
