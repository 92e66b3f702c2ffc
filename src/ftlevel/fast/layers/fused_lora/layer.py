"""PEFT's LoRA layers with the fused forward, and how a `LoraConfig` comes to build them."""

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

from ftlevel.fast.layers.fused_lora.forward import FusedForward
from ftlevel.methods.upstream import is_cut_over_devices, register_lora_layers


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
        from ftlevel.fast.layers.fused_lora.quantized import find_fused_class

        layer = find_fused_class(target, kwargs)
    return None if layer is None else layer(target, adapter_name, config=config, **kwargs)


class FusedLinear(FusedForward, lora.Linear):
    """LoRA of `nn.Linear` and `Conv1D`."""

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W as (out, in)."""
        weight: torch.Tensor = self.base_layer.weight.detach().to(dtype)
        return weight.t() if self.fan_in_fan_out else weight
