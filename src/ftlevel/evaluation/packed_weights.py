"""Linear layers and their LoRA for the few rows of a decoding step on a CPU.

    float32:   y = (W + s · B A) x + b
    bfloat16:  y = W x + b + s · B (A x)

Such a step is bound by reading the weights. MKL (float32) reads them at a fraction of the memory
bandwidth, and oneDNN (bfloat16) reorders them at each call. Copies in oneDNN's blocked layout are
read up to twice as fast, those of a language head up to four times. PEFT's LoRA takes ten calls per
layer. Query, key and value, which have the same input, are one product, and so are gate and up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftlevel.fast.fused_lora import get_single_adapter
from ftlevel.models.hardware import device_memory
from ftlevel.models.upstream.tensors import pack_linear, packed_dtypes, packed_linear

MAX_ROWS = 32
"""Maximum rows of an input that is multiplied with packed weights; more rows are compute-bound."""

MIN_SIZE = 1 << 16
"""Minimum number of elements of a weight that is packed."""

MAX_SHARE = 1 / 4
"""Maximum share of the machine's memory for packed weights."""


SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of a module's layers that are called one after the other with the same input."""


class PackedWeights:
    """Packs the linear layers of `model`, whose `forward` it replaces until `close`.

    Nothing is packed on GPUs, on processors other than x86-64, or if the copies would exceed
    `MAX_SHARE`. Under autocast the copies have its dtype. The model must be in eval mode; weights
    and adapters must not change before `close`.
    """

    def __init__(self, model: nn.Module) -> None:
        dtypes = dict(_get_packable_layers(model))
        size = sum(layer.weight.numel() * dtype.itemsize for layer, dtype in dtypes.items())
        self._forwards: dict[Any, Any] = {}
        self._products: dict[tuple[nn.Module, ...], PackedProduct] = {}
        if size > MAX_SHARE * device_memory("cpu"):
            return
        modules = (m for m in model.modules() if m in dtypes or isinstance(m, lora.Linear))
        layers = {m: layer for m in modules if (layer := _create_layer(m, dtypes)) is not None}
        for layer in [layer for layer in layers.values() if layer.module is not layer.base]:
            del layers[layer.base]
        for group in _group_by_input(model, layers):
            product = PackedProduct(group)
            self._products[tuple(layer.module for layer in group)] = product
            for at, layer in enumerate(group):
                self._forwards[layer.module] = partial(product.forward, at)
        self._replace()

    def _replace(self) -> None:
        for layer, forward in self._forwards.items():
            layer.forward = forward

    def _restore(self) -> None:
        for layer in self._forwards:
            del layer.forward

    def get_product(self, *layers: Any) -> PackedProduct | None:
        """Returns the product of exactly these layers, in this order; None without one."""
        return self._products.get(layers)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """In the `with` block, the layers use their own weights."""
        self._restore()
        try:
            yield
        finally:
            self._replace()

    def close(self) -> None:
        """Restore the layers and free the copies."""
        self._restore()
        self._forwards, self._products = {}, {}


def _get_packable_layers(model: nn.Module) -> Iterator[tuple[Any, torch.dtype]]:
    """Yields layers with ordinary weights on the CPU, and the dtype that they compute in."""
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    for layer in model.modules():
        if type(layer) not in (nn.Linear, Conv1D) or "forward" in vars(layer):
            continue
        weight: Any = layer.weight
        dtype = autocast or weight.dtype
        is_plain = type(weight.data) is Tensor and weight.device.type == "cpu"
        if is_plain and dtype in packed_dtypes() and weight.numel() >= MIN_SIZE:
            yield layer, dtype


@dataclass(frozen=True)
class _Layer:
    """A `module` to replace: a linear layer, or LoRA around the linear layer `base`.

    `down` (r, in) and `up` (out, r) are LoRA's factors, of rank 0 without LoRA, and `scaling` the
    factor of their product.
    """

    module: Any
    base: Any
    dtype: torch.dtype
    down: Tensor
    up: Tensor
    scaling: float = 0.0

    def get_weight(self) -> Tensor:
        """Returns the weight of `base` (out, in) in `dtype`."""
        weight: Tensor = self.base.weight.detach()
        return (weight.t() if type(self.base) is Conv1D else weight).to(self.dtype)

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output of `module` without packed weights."""
        y: Tensor
        if args or kwargs or not self.scaling or self.is_off or not _computes_in(self.dtype, x):
            y = type(self.module).forward(self.module, x, *args, **kwargs)
        else:
            y = self.base(x)
            _add_update(y, x, self.down.t(), self.up.t(), self.scaling)
        return y

    @property
    def is_off(self) -> bool:
        """Whether the layer has LoRA that is disabled."""
        return bool(self.scaling) and bool(self.module.disable_adapters)


def _create_layer(module: Any, dtypes: dict[Any, torch.dtype]) -> _Layer | None:
    """Returns the layer that replaces `module`; None if its base is not in `dtypes`."""
    base = module.base_layer if isinstance(module, lora.Linear) else module
    dtype = dtypes.get(base)
    if dtype is None:
        return None
    if module is base:
        weight = base.weight.detach()
        weight = weight.t() if type(base) is Conv1D else weight
        return _Layer(base, base, dtype, weight[:0].to(dtype), weight[:, :0].to(dtype))
    name = get_single_adapter(module)
    if name is None:
        return None
    factors = [each[name].weight.detach() for each in (module.lora_A, module.lora_B)]
    if not torch.is_autocast_enabled("cpu") and {factor.dtype for factor in factors} != {dtype}:
        return None
    down, up = (factor.to(dtype) for factor in factors)
    return _Layer(module, base, dtype, down, up, module.scaling[name])


def _group_by_input(model: nn.Module, layers: dict[Any, _Layer]) -> Iterator[list[_Layer]]:
    """Yields the layers in groups that probably have the same input, and can be one product."""
    remaining = dict(layers)
    for parent in model.modules():
        for names in SAME_INPUT:
            children = [getattr(parent, name, None) for name in names]
            group = [remaining[child] for child in children if child in remaining]
            biases = {layer.base.bias is None for layer in group}
            dtypes = {layer.dtype for layer in group}
            scalings = {layer.scaling for layer in group if layer.scaling}
            if len(group) == len(names) and max(map(len, (biases, dtypes, scalings))) == 1:
                for child in children:
                    del remaining[child]
                yield group
    yield from ([layer] for layer in remaining.values())


class PackedProduct:
    """Product of packed weights of `layers`, which have the same input, with that input.

    The first layer that is called computes the outputs of all. The others return theirs if they are
    called with the same tensor.
    """

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self._layers, self._dtype = layers, layers[0].dtype
        self._scaling = max(layer.scaling for layer in layers)
        weight = torch.cat([layer.get_weight() for layer in layers])
        down = torch.cat([layer.down for layer in layers])
        up = torch.block_diag(*(each.up for each in layers))  # type: ignore[no-untyped-call]
        self._update: tuple[Tensor, Tensor] | None = None
        if self._scaling and self._dtype == torch.float32:
            weight.addmm_(up, down, alpha=self._scaling)
        elif self._scaling:
            self._update = down.t(), up.t().contiguous()
        biases = [layer.base.bias for layer in layers if layer.base.bias is not None]
        self._bias = torch.cat(biases).detach().to(self._dtype) if biases else None
        self._packed = pack_linear(weight, MAX_ROWS // 4)
        self._sizes = [len(layer.up) for layer in layers]
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    @property
    def is_off(self) -> bool:
        """Whether LoRA of a layer is disabled."""
        return any(layer.is_off for layer in self._layers)

    def forward(self, at: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output of layer `at` for `x` (…, in), by its own weights for many rows."""
        has_few_rows = 0 < x.numel() <= MAX_ROWS * x.shape[-1]
        layer = self._layers[at]
        if args or kwargs or layer.is_off or not has_few_rows or not _computes_in(self._dtype, x):
            return layer.run(x, *args, **kwargs)
        if x is not self._input or at not in self._outputs:
            outputs = torch.split(self(x), self._sizes, -1)
            self._input, self._outputs = x, dict(enumerate(outputs))
        return self._outputs.pop(at)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the concatenated outputs of all layers for `x` (few rows, in)."""
        x = x.to(self._dtype)
        y = packed_linear(x, self._packed, self._bias)
        if self._update is not None:
            _add_update(y, x, *self._update, self._scaling)
        return y


def _add_update(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> None:
    """Add scaling · x @ `down` (in, r) @ `up` (r, out) to `y` (…, out, modified)."""
    inner = x.reshape(-1, x.shape[-1]).to(down.dtype) @ down
    y.view(-1, y.shape[-1]).addmm_(inner, up, alpha=scaling)


def _computes_in(dtype: torch.dtype, x: Tensor) -> bool:
    """Returns whether a linear layer computes in `dtype` for input `x` here, without gradients."""
    here = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return here == dtype and not torch.is_grad_enabled()
