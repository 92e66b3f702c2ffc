"""Device and dtype of the adapters of ftlevel's tuners.

PEFT creates adapters in the dtype of the base and then casts them to float32, which rounds values.
These are created in float32 and cast only if `autocast_adapter_dtype` is False.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class PrecisionLayer:
    """Mixin that casts and moves adapters; must precede `BaseTunerLayer`."""

    adapter_layer_names: tuple[str, ...]
    get_base_layer: Callable[[], nn.Module]

    def tensors_of(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of one adapter."""
        for group in self.adapter_layer_names:
            members = getattr(self, group)
            if adapter_name in members:
                member = members[adapter_name]
                yield from [member] if isinstance(member, nn.Parameter) else member.parameters()

    def cast_to_base(self, adapter_name: str) -> None:
        """Cast one adapter to the floating-point dtype of the base, if it has one (mutated)."""
        like = first_float(self.get_base_layer())
        if like is not None:
            for parameter in self.tensors_of(adapter_name):
                parameter.data = parameter.data.to(like.dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move one adapter to the device of the base without a cast (mutated)."""
        like = first_float(self.get_base_layer())
        target = device or (None if like is None else like.device)
        for parameter in self.tensors_of(adapter_name):
            if target is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(target)


class PrecisionTuner:
    """Mixin for tuners of these layers; must precede `BaseTuner`."""

    model: Any
    tuner_layer_cls: type[PrecisionLayer]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep an adapter in float32, or cast it to the dtype of its base (mutated)."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)  # type: ignore[misc]
        if not autocast_adapter_dtype:
            for layer in self.model.modules():
                if isinstance(layer, self.tuner_layer_cls):
                    layer.cast_to_base(adapter_name)


def first_float(module: nn.Module) -> nn.Parameter | None:
    """Return the first floating-point parameter of `module`, or None."""
    return next((p for p in module.parameters() if p.is_floating_point()), None)
