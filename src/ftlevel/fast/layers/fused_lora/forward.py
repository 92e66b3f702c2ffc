"""The forward of a LoRA layer as one fused autograd function, and when it applies."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ftlevel.fast.layers.fused_lora.function import FusedLoraFunction
from ftlevel.fast.layers.recompute import recomputation_of
from ftlevel.models.upstream.tensors import is_watched


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
