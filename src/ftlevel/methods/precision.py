"""Where adapters of our tuners are: on the device of their base, in float32 or in its precision.

PEFT makes an adapter in the base's precision and then casts it to float32, which rounds what was
drawn or read. Ours begin in float32, and are rounded only where PEFT is told not to cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class PrecisionLayer:
    """A layer that casts and moves its adapters; it stands before `BaseTunerLayer`."""

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
        """Cast one adapter to the precision of the base; a quantized one has none (mutated)."""
        like = first_float(self.get_base_layer())
        if like is not None:
            for parameter in self.tensors_of(adapter_name):
                parameter.data = parameter.data.to(like.dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move one adapter to the device of the base, and leave its precision (mutated)."""
        like = first_float(self.get_base_layer())
        target = device or (None if like is None else like.device)
        for parameter in self.tensors_of(adapter_name):
            if target is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(target)


class PrecisionTuner:
    """A tuner of such layers; it stands before `BaseTuner` among the bases."""

    model: Any
    tuner_layer_cls: type[PrecisionLayer]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave an adapter in float32, or cast it to the precision of its base (mutated).

        Args:
            adapter_name: its name.
            autocast_adapter_dtype: PEFT's word for float32.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)  # type: ignore[misc]
        if not autocast_adapter_dtype:
            for layer in self.model.modules():
                if isinstance(layer, self.tuner_layer_cls):
                    layer.cast_to_base(adapter_name)


def first_float(module: nn.Module) -> nn.Parameter | None:
    """Return the first parameter of `module` that is of floating point, if it has one."""
    return next((p for p in module.parameters() if p.is_floating_point()), None)
