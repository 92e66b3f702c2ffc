"""The fused function: y = x Wᵀ + b + s · d Aᵀ Bᵀ, with d = dropout(x), and its backward at once.

W is frozen, A is (r, in), B is (out, r). With g = ∂L/∂y, both (tokens, out), h = s · A dᵀ and
u = s · Bᵀ gᵀ, which the products multiply by s before they are rounded:

    ∂L/∂x = g W    ∂L/∂d = uᵀ A    ∂L/∂A = u d    ∂L/∂B = (h g)ᵀ    ∂L/∂b = Σ g

The update comes first, and the base's product is added to it: so the sum is rounded once, where the
other order rounds the base's part and then the sum, and the large product reads the small one while
it computes. Without dropout d is x, and ∂L/∂x is made alike. All that is r wide is held as
(r, tokens): with r as the rows, oneDNN and MKL run these products at 85 to 120 GFLOP/s a core in
bfloat16 where (tokens, r) costs up to four times as much (docs/performance.md).

The forward of a LoRA layer as one fused autograd function, and when it applies.

PEFT's LoRA layers with the fused forward, and how a `LoraConfig` comes to build them.

Fused layers on bitsandbytes' linears. Import it only where bitsandbytes is imported anyway.

The product that a recomputed block does not need.

The backward pass computes a block again for what its operations had saved. Of the linear with which
a block ends, out = states + down(…), that is the input and the update's inner part: no gradient
asks for the product itself, which is as much as a tenth of the block. A block is asked once, by the
graph of its own output, whether it ends like that; the layer gives NaN then in the place of a
product that nobody reads, so that a reader would be heard of.

LoRA's linear as one fused autograd function, on float, 4-bit and 8-bit bases.

PEFT computes `base(x) + B(A(dropout(x))) * s` as eight operations with four casts of activations
around them. Here base and update are one function that computes in the base's precision from
float32 A and B. The layers are PEFT's own classes with another `forward`: parameters, state dict,
merging, switching and the saved adapter are PEFT's; where the function does not apply, so is
`forward`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ftlevel.fast.layers.recompute import Recomputation, recomputation_of
from ftlevel.methods.upstream import is_cut_over_devices, register_lora_layers
from ftlevel.models.upstream.quantizers import can_train_4bit, can_train_8bit, dequantize_8bit
from ftlevel.models.upstream.tensors import (
    cast_together,
    is_in_backward,
    is_watched,
    new_shape,
    order_of,
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


class FusedForward:
    """A LoRA layer's forward, fused in training; in any other case its PEFT class's own.

    Evaluation and generation thereby see what anyone sees who loads the adapter with PEFT.

    Attributes:
        ends_a_block: whether nobody reads its product where its block is computed again.
    """

    ends_a_block = False

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return base and update of `x`: (…, in) → (…, out)."""
        name = None if args or kwargs else _lone_adapter(self)
        if name is None or not self._is_ready():
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # PEFT's
        compute, result = self._dtypes(x)
        x = x.to(compute)
        dropout = self.lora_dropout[name]
        with torch.autocast(x.device.type, enabled=False):
            y = FusedLoraFunction.apply(  # type: ignore[no-untyped-call]  # torch's
                x,
                None if isinstance(dropout, nn.Identity) else dropout(x),
                self.lora_A[name].weight,
                self.lora_B[name].weight,
                self.base_layer.bias,
                functools.partial(self._weight, compute),
                self.scaling[name],
                recomputation_of(x),
                self,
            )
        return y.to(result)

    def __repr__(self) -> str:
        """Print as PEFT's layer: parameters and state are that one's."""
        return super().__repr__().replace("lora.Fused", "lora.", 1)

    def _is_ready(self) -> bool:
        """Whether the base's weight can be read as it stands."""
        return True

    def _dtypes(self, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes that the base computes `x` in and returns: autocast's or its own."""
        device = x.device.type
        own = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return own, own


def _lone_adapter(layer: Any) -> str | None:
    """Return the one active adapter of `layer`, if base and update can be fused.

    None where there are several or none, a variant such as DoRA, a bias of B, hooks (of offloading,
    tensor parallelism, an observer), which expect their module to be called, or a trained base.
    """
    if not layer.training or layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return None
    name = names[0]
    base = layer.base_layer
    if name in layer.lora_variant or layer.lora_bias[name] or base.weight.requires_grad:
        return None
    watched = any(map(is_watched, (base, layer.lora_A[name], layer.lora_B[name])))
    return None if watched else name


def register_fused_layers(config: LoraConfig) -> None:
    """Make `config` (mutated) build fused layers where there is one, and PEFT's elsewhere.

    This is PEFT's door for custom modules. Nothing of it is saved: the adapter's configuration
    and keys are those of a plain LoRA, and whoever loads it gets PEFT's layers.
    """
    register_lora_layers(config, {nn.Linear: build_fused_layer, Conv1D: build_fused_layer})


def build_fused_layer(
    target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
) -> nn.Module | None:
    """Return a fused layer around `target`, or None where PEFT should build its own.

    Args:
        target: the module to adapt.
        adapter_name: of the first adapter on it.
        config: the adapter's.
        kwargs: as PEFT passes them to its own layers.
    """
    layer: Any = None
    if isinstance(target, BaseTunerLayer) or is_cut_over_devices(target):
        return None
    if kwargs.get("parameter_name") is not None:  # LoRA of a bare parameter
        return None
    is_conv1d = type(target) is Conv1D
    if type(getattr(target, "weight", None)) not in (nn.Parameter, torch.Tensor) and (
        type(target) is nn.Linear
    ):
        return None  # a quantized tensor in a plain linear, as torchao has it
    if type(target) is nn.Linear or is_conv1d:
        if bool(config.fan_in_fan_out) is not is_conv1d:  # PEFT corrects the config, and warns
            return None
        layer = functools.partial(FusedLinear, is_target_conv_1d_layer=is_conv1d)
    elif "bitsandbytes" in sys.modules:  # importing it takes a second
        layer = find_fused_class(target, kwargs)
    return None if layer is None else layer(target, adapter_name, config=config, **kwargs)


class FusedLinear(FusedForward, lora.Linear):
    """LoRA of `nn.Linear` and `Conv1D`."""

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W as (out, in)."""
        weight: torch.Tensor = self.base_layer.weight.detach().to(dtype)
        return weight.t() if self.fan_in_fan_out else weight


def find_fused_class(target: nn.Module, kwargs: Mapping[str, Any]) -> type | None:
    """Return the fused layer's class for `target`, or None.

    Args:
        target: the module to adapt.
        kwargs: PEFT's, which say whether the model was loaded in 4 or in 8 bits.
    """
    if kwargs.get("loaded_in_4bit") and isinstance(target, bnb.nn.Linear4bit):
        return FusedLinear4bit
    if kwargs.get("loaded_in_8bit") and isinstance(target, bnb.nn.Linear8bitLt):
        return FusedLinear8bitLt
    return None


class FusedLinear4bit(FusedForward, lora.Linear4bit):
    """LoRA of `bitsandbytes.nn.Linear4bit`: W is dequantized once forward and once backward."""

    def _is_ready(self) -> bool:
        return can_train_4bit(self.base_layer)

    def _dtypes(self, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Return the base's compute dtype, and x's, in which bitsandbytes returns."""
        return self.base_layer.compute_dtype, x.dtype

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W as (out, in), dequantized."""
        weight = self.base_layer.weight
        return dequantize_4bit(weight.data.view(-1, 1), weight.quant_state).to(dtype)


class FusedLinear8bitLt(FusedForward, lora.Linear8bitLt):
    """LoRA of `bitsandbytes.nn.Linear8bitLt`, on the CPU.

    There bitsandbytes trains on the dequantized weight as well. On a GPU it multiplies in int8,
    which the fused function does not: PEFT's forward runs.
    """

    def _is_ready(self) -> bool:
        return can_train_8bit(self.base_layer)

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_8bit(self.base_layer, dtype)


def skip_unneeded_products(blocks: Sequence[nn.Module]) -> None:
    """Have the fused linears that `blocks` (mutated) end with compute nothing again."""
    for block in blocks:
        _ask_once(block)


def _ask_once(block: nn.Module) -> None:
    def ask(block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - a hook
        states = output[0] if isinstance(output, tuple) and output else output
        if getattr(states, "grad_fn", None) is None or is_in_backward():
            return
        hook.remove()
        layer = _last_layer(states.grad_fn)
        if layer is not None:
            layer.ends_a_block = True

    hook = block.register_forward_hook(ask)


def _last_layer(added: Any) -> Any:
    """Return the fused layer whose product `added`, an output's `grad_fn`, adds to what was."""
    while added.name() == "ViewBackward0":
        ((added, _),) = added.next_functions
    if added.name() != "AddBackward0":
        return None
    # What was computed before something else may have been read by it.
    parents = [parent for parent, _ in added.next_functions if parent is not None]
    return getattr(max(parents, key=order_of, default=None), "layer", None)


__all__ = ["register_fused_layers", "skip_unneeded_products"]
