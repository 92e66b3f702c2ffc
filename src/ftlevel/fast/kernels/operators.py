"""The Triton kernels as torch operators, with output shapes known without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ftlevel.fast.kernels.formulas import Pair

# The library unregisters its operators when it is deleted.
_LIBRARY: Any = torch.library.Library("ftlevel", "DEF")  # type: ignore[no-untyped-call]


def _define(name: str, schema: str, shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Return the operator of `programs.NAME`, for a GPU or Triton's interpreter."""

    def compute(*arguments: Any) -> Any:
        from ftlevel.fast.kernels import programs  # Triton is optional

        return getattr(programs, name)(*arguments)

    _LIBRARY.define(f"{name}{schema}")
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, compute, key)
    _LIBRARY.impl(name, shapes, "Meta")
    operator: Callable[..., Any] = getattr(torch.ops.ftlevel, name)
    return operator


def _scale_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _like(*places: int) -> Callable[..., Any]:
    """Return a function that creates empty tensors like the arguments at `places`; -1 is like ρ."""

    def make(*arguments: Any) -> Any:
        made = [
            _scale_like(arguments[0]) if at < 0 else torch.empty_like(arguments[at])
            for at in places
        ]
        return made[0] if len(made) == 1 else tuple(made)

    return make


_norm = _define("norm", "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _like(0, -1))
_renorm = _define("renorm", "(Tensor x, Tensor weight, Tensor scale) -> Tensor", _like(0))
_norm_backward = _define(
    "norm_backward", "(Tensor gradient, Tensor x, Tensor weight, Tensor scale) -> Tensor", _like(1)
)
_glu = _define("glu", "(str kind, Tensor gate, Tensor up) -> Tensor", _like(1))
_glu_backward = _define(
    "glu_backward",
    "(str kind, Tensor gradient, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _like(2, 3),
)
_rope = _define(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool backward) -> (Tensor, Tensor)",
    _like(0, 1),
)
_cross_entropy = _define(
    "cross_entropy",
    "(Tensor scores, Tensor targets, float smoothing) -> (Tensor, Tensor)",
    lambda scores, _, __: (_scale_like(scores)[..., 0], torch.empty_like(scores)),
)


class TritonFormulas:
    """Implementation with one Triton kernel each; views are made contiguous."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Pair:
        """Return y and ρ."""
        made: Pair = _norm(x.contiguous(), weight, eps)
        return made

    def renorm(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return y again, bit for bit, from ρ."""
        made: torch.Tensor = _renorm(x.contiguous(), weight, scale)
        return made

    def norm_backward(
        self, gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Return ∂L/∂x."""
        made: torch.Tensor = _norm_backward(gradient.contiguous(), x.contiguous(), weight, scale)
        return made

    def glu(self, kind: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return y."""
        made: torch.Tensor = _glu(kind, gate.contiguous(), up.contiguous())
        return made

    def glu_backward(
        self, kind: str, gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> Pair:
        """Return ∂L/∂g and ∂L/∂u."""
        parts = (part.contiguous() for part in (gradient, gate, up))
        made: Pair = _glu_backward(kind, *parts)
        return made

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
        made: Pair = _rope(*(part.contiguous() for part in (q, k, cos, sin)), backward)
        return made

    def cross_entropy(self, scores: torch.Tensor, targets: torch.Tensor, smoothing: float) -> Pair:
        """Return the losses, and their gradient in the dtype of `scores`."""
        made: Pair = _cross_entropy(scores.contiguous(), targets.contiguous(), smoothing)
        return made
