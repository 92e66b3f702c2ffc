"""The bottleneck adapter around one module.

    serial:    h ← h + s · up(f(down(h))),  h the module's output
    parallel:  h ← h + s · up(f(down(x))),  x the input of the feed-forward that the module ends

down is (hidden → bottleneck), up is (bottleneck → hidden), both with bias (Houlsby et al., 2019,
section 2.1; He et al., 2022, section 3.3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN

from ftlevel.methods.bottleneck.config import BottleneckConfig
from ftlevel.methods.precision import PrecisionLayer
from ftlevel.methods.unmergeable import UnmergeableLayer

CANNOT_MERGE = (
    "A bottleneck adapter is not linear in the hidden state, so no weight of the base model can "
    "hold it and it cannot be merged. Keep it beside the base, which costs two small matrix "
    "products a site, or train with a method that merges, such as --method lora."
)


@dataclass(frozen=True)
class Settings:
    """What one adapter does between and after its projections; nothing here is trained."""

    parallel: bool
    activation: Callable[[torch.Tensor], torch.Tensor]
    dropout: float
    scaling: float


class BottleneckLayer(UnmergeableLayer, PrecisionLayer, nn.Module, BaseTunerLayer):
    """A module and the adapters on it, by their names.

    There is one `ModuleDict` for each of the two linears, not one of pairs: PEFT takes an
    adapter's name out of a key of the state dict only where it stands last or last but one.
    `bottleneck_pair.default.down.weight` would load under the name it was saved with, and under
    another name nothing would be loaded, without a word.

    Args:
        base_layer: the module; a linear of any library, or a whole feed-forward that returns its
            hidden states alone or first in a tuple.
    """

    cannot_merge = CANNOT_MERGE
    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("settings",)
    in_features: int
    out_features: int
    # PEFT's, whose types nn.Module's __getattr__ hides.
    get_base_layer: Callable[[], nn.Module]
    _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.settings: dict[str, Settings] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._tap: Any = None
        self._listens = False  # torch.compile can read this, and not whether there is a hook
        self._tapped: torch.Tensor | None = None

    def update_layer(
        self, adapter_name: str, config: BottleneckConfig, *, width_in: int, width_out: int
    ) -> None:
        """Add an adapter, in float32, on the device of the module.

        Begins as the identity: up is zero and down as `nn.Linear` begins, which is how He et al.
        (2022) begin theirs. Houlsby et al. draw both from N(0, 0.01²), nearly the identity.

        Args:
            adapter_name: its name.
            config: its configuration.
            width_in: last dimension of what it reads.
            width_out: last dimension of what it adds to.
        """
        width = config.bottleneck_dim or max(1, int(width_out // config.reduction_factor))
        down = nn.Linear(width_in, width, dtype=torch.float32)
        up = nn.Linear(width, width_out, dtype=torch.float32)
        if config.init_weights:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        weight = next(self.get_base_layer().parameters(), None)
        if weight is not None and not down.weight.is_meta:
            down, up = down.to(weight.device), up.to(weight.device)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.settings[adapter_name] = Settings(
            parallel=config.placement == "parallel",
            activation=ACT2FN[config.non_linearity],
            dropout=config.adapter_dropout,
            scaling=1.0 if config.scaling is None else config.scaling,
        )

    def listen_to(self, source: nn.Module) -> None:
        """Let parallel adapters read what `source` is given, instead of the module's own input.

        `source` must run before the module in every forward pass. When activations are recomputed
        for the backward pass, both run again and the input is the recomputed one.
        """
        if self._tap is None:
            self._tap = source.register_forward_pre_hook(functools.partial(_remember, self))
            self._listens = True

    def stop_listening(self) -> None:
        """Take the hook off again; the base model is as it was."""
        if self._tap is not None:
            self._tap.remove()
            self._tap = None
            self._listens = False

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; see `BaseTunerLayer`."""
        super().delete_adapter(adapter_name)
        if not any(setting.parallel for setting in self.settings.values()):
            self.stop_listening()

    def running(self) -> list[str]:
        """Return the names of the adapters that a forward pass goes through."""
        if self.disable_adapters:
            return []
        active: list[str] = self.active_adapters  # type: ignore[assignment]  # a property of PEFT's
        return [name for name in active if name in self.settings]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, then its active adapters one after the other; (…, width_out)."""
        tapped, self._tapped = self._tapped, None
        output = self.base_layer(*args, **kwargs)
        running = self.running()
        if not running:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        for name in running:
            source = hidden
            if self.settings[name].parallel:
                source = tapped if self._listens else args[0]
            if source is None:
                raise RuntimeError(
                    "a parallel adapter did not see the input of its feed-forward: the model "
                    "computes its first linear without calling the module"
                )
            hidden = hidden + self._adapt(name, source).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _adapt(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """Return s · up(f(down(source))): (…, width_in) → (…, width_out)."""
        down, up, setting = (
            self.bottleneck_down[name],
            self.bottleneck_up[name],
            self.settings[name],
        )
        inner = setting.activation(down(self._cast_input_dtype(source, _dtype(down))))
        inner = nn.functional.dropout(inner, setting.dropout, self.training)
        return up(inner) * setting.scaling

    def __repr__(self) -> str:
        return f"bottleneck.{super().__repr__()}"


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _remember(layer: BottleneckLayer, _source: nn.Module, args: tuple[Any, ...]) -> None:
    """Keep the input of a feed-forward until `layer`, its last module, runs."""
    if any(layer.settings[name].parallel for name in layer.running()):
        layer._tapped = args[0]
