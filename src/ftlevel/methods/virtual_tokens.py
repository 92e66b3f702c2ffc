"""Base classes of the prefix and soft-prompt tuners.

Unlike PEFT's tuners, which replace linear layers, these wrap attention modules or whole layer
stacks. They cannot be merged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ftlevel.methods.base import VIRTUAL_TOKENS, UnmergeableLayer, UnmergeableTuner
from ftlevel.methods.precision import PrecisionLayer, PrecisionTuner

_DEEPEST_SUFFIX = 3


class VirtualTokenLayer(UnmergeableLayer, PrecisionLayer, nn.Module, BaseTunerLayer):
    """Virtual tokens of one module, by adapter name."""

    cannot_merge = VIRTUAL_TOKENS
    in_features: int
    out_features: int

    # Attributes of PEFT's mixin, for type checkers.
    active_adapters: Any
    disable_adapters: Any
    _get_available_adapters: Any

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def running(self) -> list[str]:
        """Return the active adapters of this layer."""
        if self.disable_adapters:
            return []
        present = self._get_available_adapters()
        return [name for name in self.active_adapters if name in present]


class VirtualTokenTuner(UnmergeableTuner, PrecisionTuner, BaseTuner):
    """Tuner that finds its modules itself; its layers are `VirtualTokenLayer`s."""

    tuner_layer_cls: type[VirtualTokenLayer] = VirtualTokenLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    @abstractmethod
    def find_modules(self) -> list[str]:
        """Return the full names of the modules to wrap."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            found = self.find_modules()
            if not found:
                raise ValueError(
                    f"no module of {model_config.get('model_type')} has a place for "
                    f"{type(self).__name__}; name some in target_modules."
                )
            names = (name for name, _ in self.model.named_modules())
            peft_config.target_modules = shortest_names(found, names)
        return peft_config

    def layers(self) -> list[Any]:
        """Return the layers of the tuner, in the model's order."""
        return [m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls)]


def shortest_names(wanted: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the shortest suffixes that PEFT matches to exactly `wanted` among `names`."""
    chosen, others = set(wanted), set(names)
    for depth in range(1, _DEEPEST_SUFFIX + 1):
        short = {".".join(name.split(".")[-depth:]) for name in chosen}
        if {n for n in others if any(n == s or n.endswith(f".{s}") for s in short)} == chosen:
            return short
    return chosen


def device_of(module: nn.Module) -> Any:
    """Return the device of a module's first parameter."""
    return next(module.parameters()).device
