"""PEFT's LoRA layers with a forward of one node, and how a `LoraConfig` comes to build them."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftlevel.fast.layers.low_rank.function import LowRankLinear
from ftlevel.fast.layers.recompute import recipe_of
from ftlevel.methods.upstream import is_cut_over_devices, register_lora_layers
from ftlevel.models.upstream.tensors import is_watched


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
        from ftlevel.fast.layers.low_rank.quantized import find_fused_class

        layer = find_fused_class(target, kwargs)
    return None if layer is None else layer(target, adapter_name, config=config, **kwargs)


class FusedForward:
    """A LoRA layer's forward as one node, in training; in any other case its PEFT class's own.

    Evaluation and generation thereby see what anyone sees who loads the adapter with PEFT.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return base and update of `x`: (…, in) → (…, out)."""
        name = None if args or kwargs else _lone_adapter(self)
        if name is None or not self._is_ready():
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # PEFT's
        compute, result = self._dtypes(x)
        x = x.to(compute)
        dropout = self.lora_dropout[name]
        with torch.autocast(x.device.type, enabled=False):
            y = LowRankLinear.apply(  # type: ignore[no-untyped-call]  # torch's
                x,
                None if isinstance(dropout, nn.Identity) else dropout(x),
                self.lora_A[name].weight,
                self.lora_B[name].weight,
                self.base_layer.bias,
                functools.partial(self._weight, compute),
                self.scaling[name],
                recipe_of(x),
            )
        return y.to(result)

    def _is_ready(self) -> bool:
        """Whether the base's weight can be read as it stands."""
        return True

    def _dtypes(self, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes that the base computes `x` in and returns: autocast's or its own."""
        device = x.device.type
        own = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return own, own


def _lone_adapter(layer: Any) -> str | None:
    """Return the one active adapter of `layer`, if base and update can be one node.

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


class FusedLinear(FusedForward, lora.Linear):
    """LoRA of `nn.Linear` and `Conv1D`."""

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W as (out, in)."""
        weight: torch.Tensor = self.base_layer.weight.detach().to(dtype)
        return weight.t() if self.fan_in_fan_out else weight
