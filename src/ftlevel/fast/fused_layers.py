"""RMS norms, gated linear units (GLU) and rotary embeddings as fused autograd functions.

Formulas are in `kernels.TorchBackend`; Triton may compute them on an NVIDIA GPU. With frozen
weights, norms save the input x and ρ = 1 / RMS(x), and GLU saves gate and up projection. Outputs
are recomputed from these, so that LoRA layers need not save them. Modules are recognized by their
output for random input, not by their names.

Where a GPU supports it, one kernel rotates queries and keys in forward, and one in backward. It
replaces `apply_rotary_pos_emb` in each transformers module where that computes the formula. The
original runs for all arguments that the kernel does not support.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ftlevel.fast.kernels import ACTIVATIONS, NO_KERNELS, TORCH, Kernels, Pair, TorchBackend
from ftlevel.fast.recompute import ReplacedModules, with_recomputation
from ftlevel.models.upstream.tensors import copy_module, is_watched


class _Norm(torch.autograd.Function):
    """RMS norm with a frozen weight; also returns ρ = 1 / RMS(x) (…, 1), without a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, backend: TorchBackend
    ) -> tuple[Tensor, Tensor]:
        normed, scale = backend.norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        return normed, scale

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        gradient: Tensor | None,
        of_scale: None,  # noqa: ARG004 - it has none
    ) -> tuple[Tensor | None, ...]:
        if gradient is None:  # y is unused
            return None, None, None, None
        return ctx.backend.norm_backward(gradient, *ctx.saved_tensors), None, None, None


class FusedNorm(nn.Module):
    """RMS norm with the weight of `norm`: fused in training, else `norm` itself runs.

    `shift` is added to the weight: 1 in Gemma, else 0. With `in_float32`, the product with the
    weight is in float32.
    """

    def __init__(
        self, norm: nn.Module, shift: float, in_float32: bool, kernels: Kernels = NO_KERNELS
    ) -> None:
        super().__init__()
        self._kernels = kernels
        self.weight: nn.Parameter = _weight_of(norm)
        self._shift, self._in_float32 = shift, in_float32
        self._eps = _eps_of(norm)
        # In a list it is no submodule: names and state dict stay the same.
        self.original = [norm]

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
        backend = self._kernels.norm(x.shape[-1], weight.dtype, x.dtype, x.device.type)
        normed, scale = _Norm.apply(x, weight, self._eps, backend)  # type: ignore[no-untyped-call]
        return with_recomputation(normed, backend.renorm, x, weight, scale)


class _Glu(torch.autograd.Function):
    """Gated linear unit: the activated gate times the up projection."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, activation: str, backend: TorchBackend
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.backend = activation, backend
        return backend.glu(activation, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.backend.glu_backward(ctx.activation, gradient, *ctx.saved_tensors)
        return *gradients, None, None


class FusedGlu(nn.Module):
    """Gated feed-forward with the layers of `block`; `activation` is a key of `ACTIVATIONS`."""

    def __init__(self, block: nn.Module, activation: str, kernels: Kernels = NO_KERNELS) -> None:
        super().__init__()
        self._kernels = kernels
        for name, child in block.named_children():
            self.add_module(name, child)
        self._activation = activation
        self.original = [block]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the feed-forward output of `x` (…, hidden)."""
        if not (self.training and torch.is_grad_enabled()):
            return self.original[0](x)
        gate, up = self.get_submodule("gate_proj")(x), self.get_submodule("up_proj")(x)
        activation, width = self._activation, gate.shape[-1]
        backend = self._kernels.glu(activation, width, gate.dtype, gate.device.type)
        gated = _Glu.apply(gate, up, activation, backend)  # type: ignore[no-untyped-call]
        gated = with_recomputation(gated, partial(backend.glu, activation), gate, up)
        return self.get_submodule("down_proj")(gated)


def get_original(module: nn.Module) -> nn.Module:
    """Returns the module that the fused norm or GLU `module` replaces; another module itself."""
    return module.original[0] if isinstance(module, FusedNorm | FusedGlu) else module


class FusedNormGlu(ReplacedModules):
    """Replaces norms and GLUs of `model` by fused ones, until `remove`; `count` is their number."""

    def __init__(self, model: nn.Module, kernels: Kernels = NO_KERNELS) -> None:
        super().__init__(model, partial(_fuse, kernels=kernels))
        self.count = len(self._replaced)


def _fuse(module: nn.Module, kernels: Kernels) -> nn.Module | None:
    """Returns a fused norm or GLU to replace `module`, or None if it cannot be fused."""
    # A norm or GLU with a further input, such as Mamba 2's gate, may equal a plain one without it.
    if is_watched(module) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    if _may_be_norm(module):
        match = _match_norm(module)
        return None if match is None else FusedNorm(module, *match, kernels)
    children = dict(module.named_children())
    if set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        activation = _match_glu(module)
        return None if activation is None else FusedGlu(module, activation, kernels)
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


NAME = "apply_rotary_pos_emb"
"""Name of the function in transformers' modules."""


class _Rope(torch.autograd.Function):
    """Rotary embedding of queries and keys that saves only cos and sin for backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: TorchBackend
    ) -> Pair:
        ctx.save_for_backward(cos, sin)
        ctx.backend = backend
        return backend.rope(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.backend.rope(of_q, of_k, *ctx.saved_tensors, backward=True)
        return *gradients, None, None, None


class FusedRope:
    """Replaces the rotary function of `model` in `count` Python modules, until `remove`."""

    def __init__(self, model: nn.Module, kernels: Kernels) -> None:
        self._replaced: list[tuple[ModuleType, Callable[..., Any]]] = []
        classes = {kind for module in model.modules() for kind in type(module).__mro__}
        modules = {kind.__module__: sys.modules.get(kind.__module__) for kind in classes}
        for _, namespace in sorted(modules.items()):
            function = getattr(namespace, NAME, None)
            if namespace is not None and function is not None and is_rope(function):
                setattr(namespace, NAME, _Replacement(function, kernels))
                self._replaced.append((namespace, function))
        self.count = len(self._replaced)

    def remove(self) -> None:
        """Restore the original functions."""
        for module, function in self._replaced:
            setattr(module, NAME, function)
        self._replaced.clear()


class _Replacement:
    """Rotary function that calls a kernel if that supports the arguments, else `function`."""

    def __init__(self, function: Callable[..., Any], kernels: Kernels) -> None:
        self.original, self._kernels = function, kernels

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **settings: Any
    ) -> Any:
        backend: TorchBackend = TORCH
        if (
            torch.is_grad_enabled()
            and not (others or settings)
            and _supports_kernel(q, k, cos, sin)
        ):
            heads = (q.shape[1], k.shape[1], q.shape[3])
            backend = self._kernels.rope(heads, q.dtype, q.device.type)
        if backend is TORCH:
            return self.original(q, k, cos, sin, *others, **settings)
        rotated = _Rope.apply(  # type: ignore[no-untyped-call]  # torch's
            q.transpose(1, 2), k.transpose(1, 2), cos, sin, backend
        )
        return tuple(part.transpose(1, 2) for part in rotated)


def _supports_kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Returns whether a kernel supports these tensors: equal dtypes, whole heads rotated."""
    if not q.dim() == k.dim() == 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    batch, _, tokens, width = q.shape
    angles = ((1, tokens, width), (batch, tokens, width))
    shapes_match = (k.shape[0], *k.shape[2:]) == (batch, tokens, width)
    one = {part.dtype for part in (q, k, cos, sin)}
    frozen = not (cos.requires_grad or sin.requires_grad)
    return (
        shapes_match and tuple(cos.shape) in angles and len(one) == 1 and frozen and width % 2 == 0
    )


def is_rope(function: Any) -> bool:
    """Returns whether `function` equals `TorchBackend.rope`, bit for bit in bfloat16."""
    if isinstance(function, _Replacement):
        return False  # of a different fast step
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
