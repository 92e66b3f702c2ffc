"""What our tuners of virtual tokens share: a layer that knows its adapters, and how they are found.

PEFT's own tuners replace single linears. A prefix belongs to an attention, and a soft prompt to a
whole stack of layers; neither can be merged.
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
    """The virtual tokens of one module, by the names of the adapters they belong to.

    Attributes:
        in_features: width of what the module is given, which a layer of PEFT's says.
        out_features: width of what it returns.
    """

    cannot_merge = VIRTUAL_TOKENS
    in_features: int
    out_features: int

    # What PEFT's mixin has, to type checkers that read none of its types.
    active_adapters: Any
    disable_adapters: Any
    _get_available_adapters: Any

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def running(self) -> list[str]:
        """Return the names of the adapters that a forward pass goes through."""
        if self.disable_adapters:
            return []
        present = self._get_available_adapters()
        return [name for name in self.active_adapters if name in present]


class VirtualTokenTuner(UnmergeableTuner, PrecisionTuner, BaseTuner):
    """A tuner that finds its modules by itself, and whose layers are `VirtualTokenLayer`s."""

    tuner_layer_cls: type[VirtualTokenLayer] = VirtualTokenLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    @abstractmethod
    def find_modules(self) -> list[str]:
        """Return the full names of the modules that the method wraps."""

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
    """Return the shortest names that PEFT's suffix match reads as exactly `wanted`.

    Args:
        wanted: full names of modules.
        names: those of all modules.
    """
    chosen, others = set(wanted), set(names)
    for depth in range(1, _DEEPEST_SUFFIX + 1):
        short = {".".join(name.split(".")[-depth:]) for name in chosen}
        if {n for n in others if any(n == s or n.endswith(f".{s}") for s in short)} == chosen:
            return short
    return chosen


def device_of(module: nn.Module) -> Any:
    """Return the device of a module's first parameter."""
    return next(module.parameters()).device
