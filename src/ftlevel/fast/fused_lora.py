"""LoRA layers as one fused autograd function, on float, 4-bit and 8-bit bases.

    y = x Wᵀ + b + s · d Aᵀ Bᵀ,  d = dropout(x),  g = ∂L/∂y,  h = s · A dᵀ,  u = s · Bᵀ gᵀ
    ∂L/∂x = g W    ∂L/∂d = uᵀ A    ∂L/∂A = u d    ∂L/∂B = (h g)ᵀ    ∂L/∂b = Σ g

W is frozen, A is (r, in), B is (out, r); PEFT needs eight operations and four casts. The base's
product is added to the update, so the sum is rounded once. On a CPU tensors of width r are stored
as (r, tokens), because oneDNN and MKL are up to four times slower with (tokens, r)
(docs/performance.md); on a GPU as (tokens, r), because cuBLAS is slow if the leading dimension is
no multiple of 8.

The layers are PEFT classes with a different `forward`, so parameters, state dict and merging are
PEFT's. Where fusion does not apply, PEFT's `forward` runs. When gradient checkpointing recomputes
a block, the output of its last linear layer is not needed: it is NaN, so that any use of it shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ftlevel.fast.recompute import Recomputation, recomputation_of
from ftlevel.methods.upstream import is_sharded_linear, register_lora_layers
from ftlevel.models.upstream.quantizers import (
    dequantize_8bit,
    supports_4bit_training,
    supports_8bit_training,
)
from ftlevel.models.upstream.tensors import (
    cast_together,
    is_in_backward,
    is_on_gpu,
    is_watched,
    new_shape,
    order_of,
    submodules_of,
)


class FusedLoraFunction(torch.autograd.Function):
    """A frozen linear layer and its low-rank update; formulas in the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_dropout: Tensor | None,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        weight: Callable[[], Tensor],
        scaling: float,
        recomputation: tuple[Recomputation, tuple[Tensor, ...]] | None = None,
        layer: Any = None,
    ) -> Tensor:
        """Returns y = W x + b + s · B A dropout(x), `(…, out)`, in the dtype of `x` `(…, in)`.

        `x_dropout` is dropout(x), or None without dropout. `weight` returns W (out, in); it is
        called once in forward and once in backward, so that a dequantized weight is not stored.
        With `recomputation` and no dropout, x is recomputed in backward instead of saved. While a
        block is recomputed, its last `layer` returns NaN, because nothing reads its output.
        """
        rows = x.reshape(-1, x.shape[-1])
        source = rows if x_dropout is None else x_dropout.reshape(rows.shape)
        down, up = cast_together([a, b], x.dtype)
        inner = _narrow(down, source, scaling)
        if layer is not None and layer.is_block_output and is_in_backward():
            y = x.new_full((), torch.nan).expand(len(rows), len(up))
        else:
            y = _output(rows, inner, up, bias, weight)
        saved_tensors: tuple[Tensor, ...] = (source,)
        ctx.recomputation = None
        if recomputation is not None and x_dropout is None:
            ctx.recomputation, saved_tensors = recomputation
            ctx.recomputation.register()
        ctx.save_for_backward(inner, down, up, *saved_tensors)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        ctx.dtypes = (a.dtype, b.dtype, None if bias is None else bias.dtype)
        ctx.has_dropout, ctx.layer = x_dropout is not None, layer
        # Not a view: in-place changes of a returned view are errors, and Longformer, LED and
        # DeBERTa scale their queries in place.
        return new_shape(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of forward's arguments."""
        inner, down, up, *saved = ctx.saved_tensors
        for_x, for_dropped, for_a, for_b, for_bias = ctx.needs_input_grad[:5]
        dtype_a, dtype_b, dtype_bias = ctx.dtypes
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_dropout = grad_a = grad_b = grad_bias = None
        grad_inner = _narrow(up.t(), g, ctx.scaling)
        if for_x:
            if ctx.has_dropout:
                grad_x = g @ ctx.weight()
            else:
                grad_x = (grad_inner.t() @ down).addmm_(g, ctx.weight())
            grad_x = grad_x.view(ctx.shape)
        if for_dropped:
            grad_dropout = (grad_inner.t() @ down).view(ctx.shape)
        if for_a:
            source = saved[0] if ctx.recomputation is None else ctx.recomputation.make(*saved)
            source = source.reshape(-1, source.shape[-1])
            grad_a = _product(grad_inner, source, dtype_a)
        if for_b:
            grad_b = _product(inner, g, dtype_b, transposed=True)
        if for_bias:
            grad_bias = g.sum(0, dtype=dtype_bias)
        return grad_x, grad_dropout, grad_a, grad_b, grad_bias, None, None, None, None


def _output(
    rows: Tensor, inner: Tensor, up: Tensor, bias: Tensor | None, weight: Callable[[], Tensor]
) -> Tensor:
    factors = (inner.t(), up.t())
    y = torch.mm(*factors) if bias is None else torch.addmm(bias.to(rows.dtype), *factors)
    return y.addmm_(rows, weight().t())


def compute_without_gradient(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    weight: Callable[[], Tensor],
    scaling: float,
) -> Tensor:
    """Returns the output of `FusedLoraFunction`, without dropout and the cost of autograd."""
    rows = x.reshape(-1, x.shape[-1])
    down, up = cast_together([a, b], x.dtype)
    y = _output(rows, _narrow(down, rows, scaling), up, bias, weight)
    return y.view(*x.shape[:-1], y.shape[-1])


def _narrow(factor: Tensor, rows: Tensor, scaling: float) -> Tensor:
    """Returns `scaling` · `factor` @ `rows`ᵀ, (r, tokens), for `factor` (r, width)."""
    if is_on_gpu(rows):
        return _scaled(rows, factor.t(), scaling).t()
    return _scaled(factor, rows.t(), scaling)


def _scaled(one: Tensor, tensor: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return one @ tensor
    product = one.new_empty(one.shape[0], tensor.shape[1])
    return product.addmm_(one, tensor, beta=0, alpha=factor)


def _product(
    one: Tensor, matrix: Tensor, dtype: torch.dtype, *, transposed: bool = False
) -> Tensor:
    """Returns `one` @ `matrix` in `dtype`; with `transposed`, the transpose of this product.

    For a float32 result on NVIDIA GPUs, the sums of 16-bit factors are not rounded to 16 bits.
    """
    lower = one.dtype in (torch.bfloat16, torch.float16)
    if one.is_cuda and lower and dtype == torch.float32 and torch.version.hip is None:
        one, matrix = (matrix.t(), one.t()) if transposed else (one, matrix)
        return torch.mm(one, matrix, out_dtype=dtype)
    product = (one @ matrix).to(dtype)
    return product.t() if transposed else product


class FusedForward:
    """Mixin with a LoRA forward that is fused in training and, on a GPU, in evaluation.

    On a CPU, evaluation is bit-identical to PEFT's. Where fusion does not apply, PEFT's forward
    runs.

    `is_block_output` marks a block's last layer, whose output is not needed in recomputation.
    """

    is_block_output = False

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns base output plus update: (…, in) → (…, out)."""
        name = None if args or kwargs or not self._can_fuse(x) else get_single_adapter(self)
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # PEFT's
        compute_dtype, output_dtype = self._get_dtypes(x)
        x = x.to(compute_dtype)
        modules = submodules_of(self)
        a, b = (submodules_of(modules[kind])[name].weight for kind in ("lora_A", "lora_B"))
        bias, scaling = modules["base_layer"].bias, self.scaling[name]
        weight = functools.partial(self._weight, compute_dtype)
        dropout = submodules_of(modules["lora_dropout"])[name]
        has_dropout = self.training and not isinstance(dropout, nn.Identity)
        with torch.autocast(x.device.type, enabled=False):
            if not (has_dropout or torch.is_grad_enabled()):
                return compute_without_gradient(x, a, b, bias, weight, scaling).to(output_dtype)
            x_dropout, recomputation = dropout(x) if has_dropout else None, recomputation_of(x)
            arguments = (x, x_dropout, a, b, bias, weight, scaling, recomputation, self)
            y = FusedLoraFunction.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's
        return y.to(output_dtype)

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.Fused", "lora.", 1)

    def _can_fuse(self: Any, x: Tensor) -> bool:
        return self.training or is_on_gpu(x)

    def _get_dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Returns compute and output dtype of the base layer: both autocast's, else that of `x`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return dtype, dtype


def get_single_adapter(layer: Any) -> str | None:
    """Returns the single active adapter of `layer`; None if `layer` cannot be fused.

    Variants such as DoRA, a bias of B and a trained base cannot be fused. Hooks on the layer (of
    offloading, tensor parallelism, an observer) also prevent fusion: it would skip them.
    """
    if layer.disable_adapters or layer.merged_adapters:
        return None
    modules = submodules_of(layer)
    factors_a, factors_b = (submodules_of(modules[kind]) for kind in ("lora_A", "lora_B"))
    names = [name for name in layer.active_adapters if name in factors_a]
    if len(names) != 1:
        return None
    name = names[0]
    base = modules["base_layer"]
    is_trained = base.weight.requires_grad
    if is_trained or name in layer.lora_variant or layer.lora_bias[name]:
        return None
    if is_watched(base) or is_watched(factors_a[name]) or is_watched(factors_b[name]):
        return None
    return name


def register_fused_layers(config: LoraConfig) -> None:
    """Make `config` (modified) build fused layers where possible, and PEFT's layers elsewhere."""
    register_lora_layers(config, {nn.Linear: create_fused_layer, Conv1D: create_fused_layer})


def create_fused_layer(
    target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
) -> nn.Module | None:
    """Returns a fused layer around `target`, or None if PEFT should build its own."""
    layer: Any = None
    if isinstance(target, BaseTunerLayer) or is_sharded_linear(target):
        return None
    if kwargs.get("parameter_name") is not None:  # LoRA of a bare parameter
        return None
    is_conv1d = type(target) is Conv1D
    if type(target) is nn.Linear or is_conv1d:
        if type(target.weight) not in (nn.Parameter, Tensor):
            return None  # a quantized tensor, as in torchao
        if bool(config.fan_in_fan_out) is not is_conv1d:  # PEFT corrects the config, and warns
            return None
        layer = functools.partial(FusedLinear, is_target_conv_1d_layer=is_conv1d)
    elif kwargs.get("loaded_in_4bit") and isinstance(target, bnb.nn.Linear4bit):
        layer = FusedLinear4bit
    elif kwargs.get("loaded_in_8bit") and isinstance(target, bnb.nn.Linear8bitLt):
        layer = FusedLinear8bitLt
    return None if layer is None else layer(target, adapter_name, config=config, **kwargs)


class FusedLinear(FusedForward, lora.Linear):
    """Fused LoRA of `nn.Linear` and `Conv1D`."""

    def _weight(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = self.base_layer.weight.detach().to(dtype)
        return weight.t() if self.fan_in_fan_out else weight


class FusedLinear4bit(FusedForward, lora.Linear4bit):
    """Fused LoRA of `bitsandbytes.nn.Linear4bit`; W is dequantized in forward and in backward."""

    def _can_fuse(self, x: Tensor) -> bool:
        # In evaluation, bitsandbytes has a faster kernel for a single token.
        is_single = not self.training and x.numel() == x.shape[-1]
        return super()._can_fuse(x) and not is_single and supports_4bit_training(self.base_layer)

    def _get_dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        return self.base_layer.compute_dtype, x.dtype

    def _weight(self, dtype: torch.dtype) -> Tensor:
        weight = self.base_layer.weight
        return dequantize_4bit(weight.data.view(-1, 1), weight.quant_state).to(dtype)


class FusedLinear8bitLt(FusedForward, lora.Linear8bitLt):
    """Fused LoRA of `bitsandbytes.nn.Linear8bitLt` on a CPU; on a GPU, PEFT's forward runs."""

    def _can_fuse(self, x: Tensor) -> bool:  # noqa: ARG002 - see FusedForward
        return self.training and supports_8bit_training(self.base_layer)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        return dequantize_8bit(self.base_layer, dtype)


def skip_unused_outputs(blocks: Sequence[nn.Module]) -> None:
    """Make the last linear layer of each block (modified) skip its product in recomputation."""
    for block in blocks:
        _mark_last_layer(block)


def _mark_last_layer(block: nn.Module) -> None:
    def inspect(block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - a hook
        states = output[0] if isinstance(output, tuple) and output else output
        if getattr(states, "grad_fn", None) is None or is_in_backward():
            return
        hook.remove()
        layer = _last_layer(states.grad_fn)
        if layer is not None:
            layer.is_block_output = True

    hook = block.register_forward_hook(inspect)


def _last_layer(grad_fn: Any) -> Any:
    """Returns the fused layer that computed the later operand of addition `grad_fn`, or None."""
    while grad_fn.name() == "ViewBackward0":
        ((grad_fn, _),) = grad_fn.next_functions
    if grad_fn.name() != "AddBackward0":
        return None
    # Other operations may have read an operand that was computed earlier.
    parents = [parent for parent, _ in grad_fn.next_functions if parent is not None]
    return getattr(max(parents, key=order_of, default=None), "layer", None)
