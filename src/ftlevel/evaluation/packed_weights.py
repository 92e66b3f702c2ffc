"""Linear layers and their LoRA for the few rows of a decoding step on a CPU.

    y = W x + b + s · B (A x)

Such a step is bound by reading the weights. MKL (float32) reads them at a fraction of the memory
bandwidth, and oneDNN (bfloat16) reorders them at each call. Copies in oneDNN's blocked layout are
read up to twice as fast, those of a language head up to four times. PEFT's LoRA takes ten calls per
layer, the update here takes two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
        if size > MAX_SHARE * device_memory("cpu"):
            return
        for layer, dtype in dtypes.items():
            weight, bias = layer.weight.detach(), layer.bias
            matrix = (weight.t() if type(layer) is Conv1D else weight).to(dtype).contiguous()
            packed = pack_linear(matrix, MAX_ROWS // 4)
            bias = None if bias is None else bias.detach().to(dtype)
            self._forwards[layer] = partial(_forward, layer, packed, bias, dtype)
        for layer in [module for module in model.modules() if isinstance(module, lora.Linear)]:
            name, computes_in = get_single_adapter(layer), dtypes.get(layer.base_layer)
            if name is None or computes_in is None:
                continue
            down, up = (each[name].weight.detach() for each in (layer.lora_A, layer.lora_B))
            if torch.is_autocast_enabled("cpu") or down.dtype == up.dtype == computes_in:
                update = down.to(computes_in).t(), up.to(computes_in).t(), layer.scaling[name]
                self._forwards[layer] = partial(_lora_forward, layer, *update)
        self._replace()

    def _replace(self) -> None:
        for layer, forward in self._forwards.items():
            layer.forward = forward

    def _restore(self) -> None:
        for layer in self._forwards:
            del layer.forward

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
        self._forwards = {}


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


def _forward(
    layer: Any, packed: Tensor, bias: Tensor | None, dtype: torch.dtype, x: Tensor
) -> Tensor:
    """Returns the output of `layer` for `x` (…, in), with packed weights if `x` has few rows."""
    if not 0 < x.numel() <= MAX_ROWS * x.shape[-1] or not _computes_in(dtype, x):
        return type(layer).forward(layer, x)
    return packed_linear(x.to(dtype), packed, bias)


def _lora_forward(
    layer: Any, down: Tensor, up: Tensor, scaling: float, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Returns the output of a LoRA layer for `x` (…, in); `down` is (in, r), `up` is (r, out)."""
    if args or kwargs or layer.disable_adapters or not _computes_in(down.dtype, x):
        return type(layer).forward(layer, x, *args, **kwargs)
    y: Tensor = layer.base_layer(x)
    inner = x.reshape(-1, x.shape[-1]).to(down.dtype) @ down
    y.view(-1, y.shape[-1]).addmm_(inner, up, alpha=scaling)
    return y


def _computes_in(dtype: torch.dtype, x: Tensor) -> bool:
    """Returns whether a linear layer computes in `dtype` for input `x` here, without gradients."""
    here = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return here == dtype and not torch.is_grad_enabled()
