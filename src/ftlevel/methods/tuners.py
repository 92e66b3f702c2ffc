"""Base classes of ftlevel's own PEFT tuners: precision of their weights, and virtual tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ftlevel.methods.base import VIRTUAL_TOKENS, UnmergeableLayer, UnmergeableTuner, shortest_names


@dataclass
class TargetConfig(PeftConfig):
    """Base class of the tuners' configurations.

    Attributes:
        target_modules: names of the adapted modules or one regular expression; None finds them.
        exclude_modules: excluded names or one regular expression.
        modules_to_save: modules that are fully trained and saved.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):  # PEFT expects sets
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))


class PrecisionLayer:
    """Mixin for PEFT layers that casts and moves adapter weights; must precede `BaseTunerLayer`."""

    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...] = ("configs",)
    get_base_layer: Callable[[], nn.Module]
    configs: dict[str, Any]
    disable_adapters: Any
    active_adapters: Any

    def running(self) -> list[str]:
        """Returns the names of the adapters of this layer that are active."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.configs]

    def tensors_of(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Yields the parameters of an adapter."""
        for group in self.adapter_layer_names:
            members = getattr(self, group)
            if adapter_name in members:
                member = members[adapter_name]
                yield from [member] if isinstance(member, nn.Parameter) else member.parameters()

    def cast_to_base(self, adapter_name: str) -> None:
        """Cast the adapter to the base layer's dtype if that is floating-point (not quantized)."""
        like = first_float(self.get_base_layer())
        if like is not None:
            for parameter in self.tensors_of(adapter_name):
                parameter.data = parameter.data.to(like.dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move the adapter to `device`, by default the base layer's, without a cast."""
        like = first_float(self.get_base_layer())
        target = device or (None if like is None else like.device)
        for parameter in self.tensors_of(adapter_name):
            if target is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(target)


class PrecisionTuner:
    """Mixin for tuners whose layers are `PrecisionLayer`s; a base class before `BaseTuner`."""

    model: Any
    tuner_layer_cls: type[PrecisionLayer]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast the adapter to float32 (`autocast_adapter_dtype`) or the base layers' dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)  # type: ignore[misc]
        if not autocast_adapter_dtype:
            for layer in self.model.modules():
                if isinstance(layer, self.tuner_layer_cls):
                    layer.cast_to_base(adapter_name)


def first_float(module: nn.Module) -> nn.Parameter | None:
    """Returns the first floating-point parameter of `module`, or None."""
    return next((p for p in module.parameters() if p.is_floating_point()), None)


class VirtualTokenLayer(UnmergeableLayer, PrecisionLayer, nn.Module, BaseTunerLayer):
    """Base class of PEFT layers that have the virtual tokens of one module, by adapter name."""

    merge_error = VIRTUAL_TOKENS
    in_features: int
    out_features: int

    def __init__(self) -> None:
        super().__init__()
        self.configs = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False


class VirtualTokenTuner(UnmergeableTuner, PrecisionTuner, BaseTuner):
    """Base class of tuners with `VirtualTokenLayer`s that can find their target modules."""

    tuner_layer_cls: type[VirtualTokenLayer] = VirtualTokenLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    @abstractmethod
    def default_target_modules(self) -> list[str]:
        """Returns the full names of the modules to adapt if `target_modules` is unset."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            modules = self.default_target_modules()
            if not modules:
                raise ValueError(
                    f"no module of {model_config.get('model_type')} can be adapted by "
                    f"{type(self).__name__}; set target_modules."
                )
            names = (name for name, _ in self.model.named_modules())
            peft_config.target_modules = shortest_names(modules, names)
        return peft_config

    def layers(self) -> list[Any]:
        """Returns the adapter layers in the model's order."""
        return [m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls)]


def device_of(module: nn.Module) -> Any:
    """Returns the device of `module`."""
    return next(module.parameters()).device
