"""RMS norms and gated linear units (GLU) as fused autograd functions.

    Norm: y = w · x · ρ with ρ = 1/√(mean(x²) + ε)    GLU: y = a(g) · u for gate g and up u

With frozen weights, norms save the input x and ρ = 1 / RMS(x), and GLU saves gate and up
projection. Outputs are recomputed from these, so that LoRA layers need not save them. Modules are
recognized by their output for random input, not by their names.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftlevel.fast.recompute import ReplacedModules, with_recomputation
from ftlevel.models.upstream.tensors import copy_module, gelu_backward, is_watched, silu_backward

Pair = tuple[Tensor, Tensor]

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (functional.silu, silu_backward),
    "gelu": (functional.gelu, gelu_backward),
    "gelu_tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda g, x: gelu_backward(g, x, approximate="tanh"),
    ),
}
"""Name → activation function a(g), and its backward function (∂L/∂a, g) → ∂L/∂g."""


def norm(x: Tensor, weight: Tensor, eps: float) -> Pair:
    """Returns RMSNorm y = weight · x · ρ (…, hidden), and ρ = 1 / √(mean(x²) + eps)."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return _normalize(x32, weight, scale, x.dtype), scale


def renorm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Returns the RMSNorm output y recomputed from x and ρ (`scale`), bit for bit."""
    return _normalize(x.to(scale.dtype), weight, scale, x.dtype)


def norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Returns ∂L/∂x of RMSNorm; `gradient` is ∂L/∂y, `scale` is ρ = 1 / RMS(x)."""
    x = x.to(scale.dtype)
    of_normed = gradient.to(scale.dtype) * weight.to(scale.dtype)
    along = (of_normed * x).mean(-1, keepdim=True).mul_(scale**3)
    return of_normed.mul_(scale).addcmul_(x, along, value=-1).to(gradient.dtype)


def _normalize(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    normed = x * scale
    if weight.dtype == scale.dtype:
        return normed.mul_(weight).to(dtype)
    return normed.to(dtype).mul_(weight)


class GluRecomputation:
    """Recomputes a(gate) ∘ up, and keeps a(gate) for the gradient; a is in `ACTIVATIONS`."""

    activated: Tensor | None = None

    def __init__(self, activation: str) -> None:
        self.activate, self.grad_gate = ACTIVATIONS[activation]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Returns the GLU output, bit for bit."""
        self.activated = self.activate(gate)
        return self.activated * up


class _Norm(torch.autograd.Function):
    """RMS norm with a frozen weight; also returns ρ = 1 / RMS(x) (…, 1), without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Pair:
        normed, scale = norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        return normed, scale

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        gradient: Tensor | None,
        of_scale: None,  # noqa: ARG004 - it has none
    ) -> tuple[Tensor | None, ...]:
        if gradient is None:  # y is unused
            return None, None, None
        return norm_backward(gradient, *ctx.saved_tensors), None, None


class FusedNorm(nn.Module):
    """RMS norm with the weight of `original`: fused in training, else `original` itself runs.

    `shift` is added to the weight: 1 in Gemma, else 0. With `in_float32`, the product with the
    weight is in float32.
    """

    def __init__(self, original: nn.Module, shift: float, in_float32: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter = _weight_of(original)
        self._shift, self._in_float32 = shift, in_float32
        self._eps = _eps_of(original)
        # In a list it is no submodule: names and state dict stay the same.
        self.original = [original]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalized `x` (…, hidden)."""
        weight: Tensor = self.weight
        is_equal = self._in_float32 or weight.dtype == x.dtype
        if not (self.training and torch.is_grad_enabled() and is_equal) or weight.requires_grad:
            return self.original[0](x)
        if self._in_float32:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self._shift:
            weight = weight + self._shift
        normed, scale = _Norm.apply(x, weight, self._eps)  # type: ignore[no-untyped-call]
        return with_recomputation(normed, renorm, x, weight, scale)


class _Glu(torch.autograd.Function):
    """Gated linear unit: the activated gate times the up projection."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, recompute: GluRecomputation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.recompute = recompute
        return recompute.activate(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gate, up), of = ctx.saved_tensors, ctx.recompute
        activated = of.activate(gate) if of.activated is None else of.activated
        of.activated = None
        return of.grad_gate(gradient * up, gate), activated.mul_(gradient), None


class FusedGlu(nn.Module):
    """Gated feed-forward with the layers of `block`; `activation` is a key of `ACTIVATIONS`."""

    def __init__(self, block: nn.Module, activation: str) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self._activation = activation
        self.original = [block]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the feed-forward output of `x` (…, hidden)."""
        if not (self.training and torch.is_grad_enabled()):
            return self.original[0](x)
        gate, up = self.get_submodule("gate_proj")(x), self.get_submodule("up_proj")(x)
        recompute = GluRecomputation(self._activation)
        gated = _Glu.apply(gate, up, recompute)  # type: ignore[no-untyped-call]
        return self.get_submodule("down_proj")(with_recomputation(gated, recompute, gate, up))


def get_original(module: nn.Module) -> nn.Module:
    """Returns the module that the fused norm or GLU `module` replaces; another module itself."""
    return module.original[0] if isinstance(module, FusedNorm | FusedGlu) else module


class FusedNormGlu(ReplacedModules):
    """Replaces norms and GLUs of `model` by fused ones, until `remove`; `count` is their number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, _fuse)
        self.count = len(self._replaced)


def _fuse(module: nn.Module) -> nn.Module | None:
    """Returns a fused norm or GLU to replace `module`, or None if it cannot be fused."""
    # A norm or GLU with a further input, such as Mamba 2's gate, may equal a plain one without it.
    if is_watched(module) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    if _may_be_norm(module):
        match = _match_norm(module)
        return None if match is None else FusedNorm(module, *match)
    children = dict(module.named_children())
    if set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        activation = _match_glu(module)
        return None if activation is None else FusedGlu(module, activation)
    return None


def _weight_of(norm: nn.Module) -> nn.Parameter:
    (weight,) = norm.parameters()
    return weight


def _eps_of(module: nn.Module) -> float:
    eps = getattr(module, "variance_epsilon", None)
    return float(getattr(module, "eps", 0.0) if eps is None else eps)


def _may_be_norm(module: nn.Module) -> bool:
    """Returns whether `module` has a frozen 1-D weight and an ε, and nothing else."""
    parameters = dict(module.named_parameters())
    return (
        list(parameters) == ["weight"]
        and parameters["weight"].dim() == 1
        and not parameters["weight"].requires_grad
        and not list(module.buffers())
        and isinstance(getattr(module, "variance_epsilon", getattr(module, "eps", None)), float)
    )


def _match_norm(module: nn.Module) -> tuple[float, bool] | None:
    """Returns `shift` and `in_float32` of the `FusedNorm` equal to `module`; None without one."""
    low = copy.deepcopy(module).to("cpu", torch.bfloat16)
    weight, generator = _weight_of(low), torch.Generator().manual_seed(0)
    x = torch.randn(3, len(weight), generator=generator).to(torch.bfloat16)
    with torch.no_grad():
        weight.copy_(torch.randn(len(weight), generator=generator))
        expected = _call(low, x)
    for shift in (0.0, 1.0):
        for in_float32 in (False, True):
            result = FusedNorm(low, shift, in_float32)(x)
            if expected is not None and torch.equal(result, expected.to(result)):
                return (shift, in_float32) if result.dtype == expected.dtype else None
    return None


def _match_glu(module: nn.Module) -> str | None:
    """Returns the key in `ACTIVATIONS` of the module's activation; None for a different formula."""
    low, generator = copy_module(module), torch.Generator().manual_seed(0)
    for name, (width, inner) in (
        ("gate_proj", (8, 16)),
        ("up_proj", (8, 16)),
        ("down_proj", (16, 8)),
    ):
        linear = nn.Linear(width, inner, bias=False).requires_grad_(False)
        linear.weight.copy_(torch.randn(inner, width, generator=generator))
        setattr(low, name, linear)
    sizes = torch.tensor([[1.0], [10.0], [1000.0]])  # some models clamp large values
    x = torch.randn(3, 8, generator=generator) * sizes
    if (expected := _call(low, x)) is None:
        return None
    for kind in ACTIVATIONS:
        difference = FusedGlu(low, kind)(x) - expected
        if (difference.norm(dim=-1) <= 1e-6 * expected.norm(dim=-1)).all():
            return kind
    return None


def _call(module: nn.Module, x: Tensor) -> Tensor | None:
    try:
        output = module(x)
    except (TypeError, ValueError, RuntimeError):
        return None
    return output if isinstance(output, Tensor) and output.shape == x.shape else None
