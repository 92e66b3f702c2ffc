"""Triton kernels for NVIDIA GPUs, used where they are verified and faster.

`Kernels` compares each kernel with torch's operations, forward and backward, on random values of
the model's width and precision. If Triton is missing or cannot compile, torch's are used.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ftlevel.models.upstream.tensors import gelu_backward, silu_backward

Backward = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Backward]] = {
    "silu": (functional.silu, silu_backward),
    "gelu": (functional.gelu, gelu_backward),
    "gelu_tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda g, x: gelu_backward(g, x, approximate="tanh"),
    ),
}
"""Name → activation function a(g), and its backward function (∂L/∂a, g) → ∂L/∂g."""


class TorchBackend:
    """Norms, GLU, RoPE and cross-entropy by torch's operations, on any device.

    Norm: y = w · x · ρ with ρ = 1/√(mean(x²) + ε). GLU: y = a(g) · u for gate g and up u.
    """

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Pair:
        """Returns RMSNorm y = weight · x · ρ (…, hidden), and ρ = 1 / √(mean(x²) + eps)."""
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return _normalize(x32, weight, scale, x.dtype), scale

    def renorm(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Returns the RMSNorm output y recomputed from x and ρ (`scale`), bit for bit."""
        return _normalize(x.to(scale.dtype), weight, scale, x.dtype)

    def norm_backward(self, gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Returns ∂L/∂x of RMSNorm; `gradient` is ∂L/∂y, `scale` is ρ = 1 / RMS(x)."""
        normed = x.to(scale.dtype) * scale
        of_normed = gradient.to(scale.dtype) * weight.to(scale.dtype)
        along = (of_normed * normed).mean(-1, keepdim=True)
        return of_normed.sub_(normed.mul_(along)).mul_(scale).to(x.dtype)

    def glu(self, activation: str, gate: Tensor, up: Tensor) -> Tensor:
        """Returns the GLU output a(gate) ∘ up; `activation` a is a key of `ACTIVATIONS`."""
        return ACTIVATIONS[activation][0](gate).mul_(up)

    def glu_backward(self, activation: str, gradient: Tensor, gate: Tensor, up: Tensor) -> Pair:
        """Returns ∂L/∂gate and ∂L/∂up; `gradient` is ∂L/∂y of the GLU output y."""
        activate, of_gate = ACTIVATIONS[activation]
        return of_gate(gradient * up, gate), activate(gate).mul_(gradient)

    def rope(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False
    ) -> Pair:
        """Rotate q and k (batch, seq, heads, head_dim), or with `backward` their gradients back."""
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        if backward:
            return q * cos - _rotate_half(q * sin), k * cos - _rotate_half(k * sin)
        return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin

    def cross_entropy(self, scores: Tensor, targets: Tensor, smoothing: float) -> Pair:
        """Returns the loss per target, and the gradient with respect to `scores`, in float32.

        The largest probability p gives the normalizer cheaply: log Σⱼ exp sⱼ = max s − log max p.
        """
        x32 = scores.float()
        target_logits = x32.gather(-1, targets[:, None])[:, 0]
        probabilities = torch.softmax(x32, -1)
        normalizer = x32.amax(-1) - probabilities.amax(-1).log()
        ones = probabilities.new_full((len(targets), 1), smoothing - 1.0)
        if smoothing:
            target_logits = (1 - smoothing) * target_logits + smoothing * x32.mean(-1)
            probabilities -= smoothing / x32.shape[-1]
        return normalizer - target_logits, probabilities.scatter_add_(-1, targets[:, None], ones)


def _rotate_half(x: Tensor) -> Tensor:
    """Returns J x = (−x₂, x₁) for the halves x₁ and x₂ of the last dimension."""
    one, two = x.chunk(2, -1)
    return torch.cat((-two, one), -1)


def _normalize(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    normed = x * scale
    if weight.dtype == scale.dtype:
        return normed.mul_(weight).to(dtype)
    return normed.to(dtype).mul_(weight)


TORCH = TorchBackend()


# The library unregisters its operators when it is deleted.
_LIBRARY: Any = torch.library.Library("ftlevel", "DEF")  # type: ignore[no-untyped-call]


def _define(name: str, schema: str, shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Register function `name` of `programs` as a torch operator; `shapes` is for meta tensors."""

    def compute(*arguments: Any) -> Any:
        from ftlevel.fast.kernels import programs  # Triton is optional

        return getattr(programs, name)(*arguments)

    _LIBRARY.define(f"{name}{schema}")
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, compute, key)
    _LIBRARY.impl(name, shapes, "Meta")
    return getattr(torch.ops.ftlevel, name)


def _scale_like(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _like(*indices: int) -> Callable[..., Any]:
    """Returns a function that allocates outputs like its arguments at `indices`; -1 is like ρ."""

    def make(*arguments: Any) -> Any:
        tensors = [
            _scale_like(arguments[0]) if at < 0 else torch.empty_like(arguments[at])
            for at in indices
        ]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

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


class TritonBackend(TorchBackend):
    """Operations of `TorchBackend`, one Triton kernel each; views are made contiguous."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Pair:
        return _norm(x.contiguous(), weight, eps)

    def renorm(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return _renorm(x.contiguous(), weight, scale)

    def norm_backward(self, gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return _norm_backward(gradient.contiguous(), x.contiguous(), weight, scale)

    def glu(self, activation: str, gate: Tensor, up: Tensor) -> Tensor:
        return _glu(activation, gate.contiguous(), up.contiguous())

    def glu_backward(self, activation: str, gradient: Tensor, gate: Tensor, up: Tensor) -> Pair:
        return _glu_backward(activation, *(part.contiguous() for part in (gradient, gate, up)))

    def rope(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False
    ) -> Pair:
        return _rope(*(part.contiguous() for part in (q, k, cos, sin)), backward)

    def cross_entropy(self, scores: Tensor, targets: Tensor, smoothing: float) -> Pair:
        """Returns the loss per target, and the gradient in the dtype of `scores`."""
        return _cross_entropy(scores.contiguous(), targets.contiguous(), smoothing)


TOKENS = 2048
"""Tokens of a comparison."""

NUM_TARGETS = 256
"""Targets of a comparison of losses."""

MAX_WIDTH = 32_768
"""Maximum row width of a program."""

MAX_ULPS = 4
"""Tolerance in units in the last place, for a different order of sums."""

_selected: dict[str, TorchBackend] = {}

Computation = Callable[[TorchBackend], Sequence[Tensor]]


@dataclass(frozen=True)
class Kernels:
    """Selects Triton or torch for each operation, once per process; only torch if not `allowed`."""

    allowed: bool = True

    def norm(
        self, width: int, weight: torch.dtype, dtype: torch.dtype, device: str
    ) -> TorchBackend:
        """Returns the backend of norms; `weight` is the dtype of the product with the weight."""
        is_supported = width <= MAX_WIDTH and self._is_supported(device, dtype)
        return select_norm(width, weight, dtype, device) if is_supported else TORCH

    def glu(self, activation: str, width: int, dtype: torch.dtype, device: str) -> TorchBackend:
        """Returns the backend of GLUs with `activation`."""
        return (
            select_glu(activation, width, dtype, device)
            if self._is_supported(device, dtype)
            else TORCH
        )

    def rope(self, heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> TorchBackend:
        """Returns the backend of RoPE; `heads` is (query heads, key heads, head_dim)."""
        is_supported = max(heads[:2]) * heads[2] <= MAX_WIDTH and self._is_supported(device, dtype)
        return select_rope(heads, dtype, device) if is_supported else TORCH

    def cross_entropy(self, vocab_size: int, dtype: torch.dtype, device: str) -> TorchBackend:
        """Returns the backend of cross-entropy and its gradient for logits of `vocab_size`."""
        is_supported = self._is_supported(device, dtype)
        return select_cross_entropy(vocab_size, dtype, device) if is_supported else TORCH

    def _is_supported(self, device: str, dtype: torch.dtype) -> bool:
        return self.allowed and supports_triton(device, dtype)


NO_KERNELS = Kernels(allowed=False)
"""Uses torch's operations for everything."""


@functools.cache
def select_norm(width: int, weight: torch.dtype, dtype: torch.dtype, device: str) -> TorchBackend:
    """Returns the fastest correct backend of norms; arguments as in `Kernels.norm`."""
    x, gradient = (_random(seed, (TOKENS, width), dtype, device) for seed in (0, 1))
    w = _random(2, (width,), torch.float32, device).to(weight)

    def compute(formulas: TorchBackend) -> Sequence[Tensor]:
        y, scale = formulas.norm(x, w, 1e-6)
        again = formulas.renorm(x, w, scale)
        return y, scale, again, formulas.norm_backward(gradient, x, w, scale)

    return _select_faster(f"norm {width} wide in {dtype}", compute, device)


@functools.cache
def select_glu(activation: str, width: int, dtype: torch.dtype, device: str) -> TorchBackend:
    """Returns the fastest correct backend of GLUs; arguments as in `Kernels.glu`."""
    gate, up, gradient = (_random(seed, (TOKENS, width), dtype, device) for seed in range(3))

    def compute(formulas: TorchBackend) -> Sequence[Tensor]:
        return formulas.glu(activation, gate, up), *formulas.glu_backward(
            activation, gradient, gate, up
        )

    return _select_faster(f"{activation} GLU {width} wide in {dtype}", compute, device)


@functools.cache
def select_rope(heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> TorchBackend:
    """Returns the fastest correct backend of RoPE; arguments as in `Kernels.rope`."""
    q_heads, k_heads, width = heads
    q = _random(0, (1, TOKENS, q_heads, width), dtype, device)
    k = _random(1, (1, TOKENS, k_heads, width), dtype, device)
    angles = _random(2, (1, TOKENS, width), torch.float32, device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def compute(formulas: TorchBackend) -> Sequence[Tensor]:
        return *formulas.rope(q, k, cos, sin), *formulas.rope(q, k, cos, sin, backward=True)

    return _select_faster(
        f"RoPE of {q_heads} and {k_heads} heads of {width} in {dtype}", compute, device
    )


@functools.cache
def select_cross_entropy(vocab_size: int, dtype: torch.dtype, device: str) -> TorchBackend:
    """Returns the fastest correct backend of cross-entropy; arguments as in `Kernels`."""
    scores = 4 * _random(0, (NUM_TARGETS, vocab_size), dtype, device)
    targets = scores.float().argmax(-1)
    targets[::2] = vocab_size - 1  # a likely token, and the last

    def compute(formulas: TorchBackend) -> Sequence[Tensor]:
        results = [formulas.cross_entropy(scores, targets, smoothing) for smoothing in (0.0, 0.1)]
        return [part for loss, gradient in results for part in (loss, gradient.to(dtype))]

    return _select_faster(f"loss over {vocab_size} scores in {dtype}", compute, device)


def get_used_kernels() -> dict[str, bool]:
    """Returns description → whether Triton is used, for each operation selected so far."""
    return {text: backend is not TORCH for text, backend in _selected.items()}


def supports_triton(device: str, dtype: torch.dtype) -> bool:
    """Returns whether Triton is available and supports the device and dtype."""
    return (
        device == "cuda"
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
    )


def are_close(one: Tensor, expected: Tensor) -> bool:
    """Returns whether dtypes are equal and values differ by at most `MAX_ULPS` rounding errors."""
    bound = MAX_ULPS * torch.finfo(one.dtype).eps
    a, b = one.to(torch.float32), expected.to(torch.float32)
    size = float(a.square().mean().sqrt())
    return one.dtype == expected.dtype and torch.allclose(a, b, rtol=bound, atol=bound * size)


def _select_faster(text: str, compute: Computation, device: str) -> TorchBackend:
    """Returns Triton if `compute` is faster with it and results are close, else torch."""
    triton = TritonBackend()
    _selected[text] = TORCH
    try:
        results = compute(triton)
    except Exception:  # noqa: BLE001 - whatever a compiler says of a card: the other way is there
        return TORCH
    is_equal = all(are_close(a, b) for a, b in zip(compute(TORCH), results, strict=True))
    if is_equal and time(compute, triton, device) < time(compute, TORCH, device):
        _selected[text] = triton
    return _selected[text]


def time(compute: Computation, backend: TorchBackend, device: str) -> float:
    """Returns the milliseconds of `compute(backend)` on a GPU, the best of five runs."""
    best = float("inf")
    for _ in range(5):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        compute(backend)
        end.record()
        torch.cuda.synchronize(device)
        best = min(best, float(start.elapsed_time(end)))
    return best


def _random(seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
