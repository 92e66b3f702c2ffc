"""Fused layers on bitsandbytes' linears. Import it only where bitsandbytes is imported anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners import lora
from torch import nn

from ftlevel.fast.layers.fused_lora.forward import FusedForward
from ftlevel.models.upstream.quantizers import can_train_4bit, can_train_8bit, dequantize_8bit


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
