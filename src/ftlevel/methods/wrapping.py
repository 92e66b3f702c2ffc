"""What our tuners that wrap whole modules share: a layer in its module's place, and a tuner.

PEFT's own tuners replace single linears. A prefix belongs to an attention, and a soft prompt to a
whole stack of layers; the rest of the model goes on using the wrapped module as if it were bare.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

_DEEPEST_SUFFIX = 3


class WrappingLayer(nn.Module, BaseTunerLayer):
    """A module of the model and what its adapters add around it.

    Attributes that the layer does not have are those of the module, so that code which reads
    `model.model.embed_tokens` finds it where it was.

    Args:
        base_layer: the module.
    """

    base_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def running(self) -> list[str]:
        """Return the names of the adapters that a forward pass goes through."""
        if self.disable_adapters:
            return []
        present = self._get_available_adapters()
        return [name for name in self.active_adapters if name in present]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Refuse, as nothing was merged.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(CANNOT_MERGE)


CANNOT_MERGE = (
    "Virtual tokens are inputs and not weights, so no weight of the base model can hold them and "
    "they cannot be merged. Keep the adapter beside the base, or train with a method that merges, "
    "such as --method lora."
)


class WrappingTuner(BaseTuner):
    """A tuner whose layers are `WrappingLayer`s; a subclass finds its modules and fills a layer."""

    tuner_layer_cls: type[WrappingLayer] = WrappingLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def find_modules(self) -> list[str]:
        """Return the full names of the modules that the method wraps."""
        raise NotImplementedError

    def fill(self, layer: Any, adapter_name: str, config: Any) -> None:
        """Add an adapter to `layer` (mutated)."""
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            found = self.find_modules()
            if not found:
                raise ValueError(
                    f"no module of {model_config.get('model_type')} can be wrapped by "
                    f"{type(self).__name__}; name some in target_modules."
                )
            names = (name for name, _ in self.model.named_modules())
            peft_config.target_modules = shortest_names(found, names)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,  # noqa: ARG002 - PEFT's signature
        parameter_name: str | None = None,  # noqa: ARG002 - PEFT's signature
    ) -> None:
        wrapped = isinstance(target, self.tuner_layer_cls)
        layer: Any = target if wrapped else self.tuner_layer_cls(target)
        self.fill(layer, adapter_name, peft_config)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if not wrapped:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self,
        parent: nn.Module,
        child_name: str,
        new_module: nn.Module,
        child: nn.Module,  # noqa: ARG002 - PEFT's signature
    ) -> None:
        """Put `new_module` where `child` is; PEFT's own looks for a weight, which these lack."""
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

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
