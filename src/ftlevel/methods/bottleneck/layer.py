"""Config and layer of bottleneck adapters.

    h ← h + s · up(f(down(x))),  h the module's output

x is h, the feed-forward's input, its residual r, or h + r, optionally normalized (see the package).
down is (hidden → bottleneck), up is (bottleneck → hidden), both with bias (Houlsby et al., 2019,
§ 2.1; He et al., 2022, § 3.3). s is constant, or learned as a scalar or per channel
(Steitz & Roth, 2024, § 3.3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ftlevel.config.methods.other import REDUCTION_FACTOR, Placement, default_scaling
from ftlevel.methods.base import UnmergeableLayer, UnmergeableTuner
from ftlevel.methods.bottleneck import (
    ADAPTER_POSITIONS,
    MERGE_ERROR,
    block_of,
    get_adapter_positions,
    get_input_layer,
    get_placement_error,
    target_pattern,
)
from ftlevel.methods.tuners import PrecisionLayer, PrecisionTuner, TargetConfig
from ftlevel.methods.upstream import add_peft_type, register_tuner

BOTTLENECK = add_peft_type("BOTTLENECK")


@dataclass
class BottleneckConfig(TargetConfig):
    """Configuration of `BottleneckModel`.

    Attributes:
        placement: houlsby, pfeiffer, seq_bn, parallel, par_bn or adapter_plus.
        bottleneck_dim: bottleneck width; None uses `reduction_factor`.
        reduction_factor: hidden size / bottleneck width.
        non_linearity: activation function, as named in transformers.
        adapter_dropout: dropout on the bottleneck activations.
        scaling: factor of the adapter's output, `learned`, or `channel`; None is 4 for parallel
            and par_bn, channel for adapter_plus and 1 otherwise.
        init_weights: initialize adapters to change nothing; False randomizes up, too, for tests.
    """

    placement: str = field(default="houlsby")
    bottleneck_dim: int | None = field(default=None)
    reduction_factor: float = field(default=REDUCTION_FACTOR)
    non_linearity: str = field(default="relu")
    adapter_dropout: float = field(default=0.0)
    scaling: float | str | None = field(default=None)
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        if self.placement not in get_args(Placement):
            raise ValueError(
                f"placement {self.placement!r} is not one of {', '.join(get_args(Placement))}."
            )
        if self.non_linearity not in ACT2FN:
            raise ValueError(
                f"non_linearity {self.non_linearity!r} is not one of transformers, such as "
                "relu, gelu or silu."
            )
        if self.scaling is None:
            self.scaling = default_scaling(self.placement)
        if isinstance(self.scaling, str) and self.scaling not in ("learned", "channel"):
            raise ValueError(f"scaling {self.scaling!r} is not a number, learned or channel.")


HookedInput = Literal["input", "residual"]
InputType = Literal["output", "input", "residual", "sum"]
INPUT_TYPES: dict[str, InputType] = {
    "parallel": "input",
    "par_bn": "residual",
    "seq_bn": "sum",
    "adapter_plus": "sum",
}
"""Placement -> adapter input, if it is not the module's output."""


@dataclass(frozen=True)
class LayerConfig:
    """Settings of one adapter in one layer; `scaling` is 1 if the scale is learned."""

    input_type: InputType
    activation: Callable[[Tensor], Tensor]
    dropout: float
    scaling: float

    @property
    def hooked_input(self) -> HookedInput | None:
        """Which tensor a hook must store for the adapter; None if it reads only the output."""
        if self.input_type == "output":
            return None
        return "input" if self.input_type == "input" else "residual"


class BottleneckLayer(UnmergeableLayer, PrecisionLayer, nn.Module, BaseTunerLayer):
    """PEFT layer: a base module with its adapters, by adapter name.

    The base module is a linear layer, or a feed-forward that returns its hidden states alone or
    first in a tuple. The linear layers of an adapter are in separate `ModuleDict`s because PEFT
    finds adapter names only at the end of state-dict keys.
    """

    merge_error = MERGE_ERROR
    adapter_layer_names = ("bottleneck_down", "bottleneck_up", "bottleneck_scale")
    in_features: int
    out_features: int
    # Methods of PEFT, whose types nn.Module's __getattr__ hides.
    get_base_layer: Callable[[], nn.Module]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_scale = nn.ParameterDict()
        self.configs: dict[str, LayerConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._hooks: dict[HookedInput, Any] = {}
        self._hooked: list[HookedInput] = []  # readable by torch.compile, unlike hooks
        self._inputs: dict[HookedInput, Tensor] = {}
        # In a list, so that the norm is not registered as a submodule here.
        self._norm: list[nn.Module] = []

    def update_layer(
        self,
        adapter_name: str,
        config: BottleneckConfig,
        *,
        input_type: InputType,
        widths: tuple[int, int],
    ) -> None:
        """Add an adapter in float32 on the module's device; at first it does not change the output.

        The up-projection is zero, as in He et al. (2022); Houlsby et al. use N(0, 0.01²) for both.
        `widths` are the widths of the adapter's input and output.
        """
        width_in, width_out = widths
        width = config.bottleneck_dim or max(1, int(width_out // config.reduction_factor))
        down = nn.Linear(width_in, width, dtype=torch.float32)
        up = nn.Linear(width, width_out, dtype=torch.float32)
        if config.init_weights:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        learned = {"learned": 1, "channel": width_out}.get(str(config.scaling))
        weight = next(self.get_base_layer().parameters(), None)
        if weight is not None and not down.weight.is_meta:
            down, up = down.to(weight.device), up.to(weight.device)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.configs[adapter_name] = LayerConfig(
            input_type=input_type,
            activation=ACT2FN[config.non_linearity],
            dropout=config.adapter_dropout,
            scaling=config.scaling if isinstance(config.scaling, (int, float)) else 1.0,
        )
        if learned is not None:
            ones = torch.ones(learned, dtype=torch.float32, device=up.weight.device)
            self.bottleneck_scale[adapter_name] = nn.Parameter(ones)

    def hook_input(self, source: nn.Module, name: HookedInput) -> None:
        """Register a hook that stores the input of module `source` as `name` for the adapters.

        `source` must run before `base_layer` in every forward pass; with gradient checkpointing
        both are recomputed.
        """
        if name not in self._hooks:
            hook = functools.partial(_store_input, self, name)
            self._hooks[name] = source.register_forward_pre_hook(hook)
            self._hooked.append(name)

    def set_norm(self, norm: nn.Module) -> None:
        """Make adapters read LN(output + residual), with `norm` as LN."""
        self._norm = [norm]

    def remove_hooks(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self._hooked, self._norm = {}, [], []

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and the hooks that only it needs."""
        super().delete_adapter(adapter_name)
        needed_inputs = {config.hooked_input for config in self.configs.values()}
        for name in [name for name in self._hooks if name not in needed_inputs]:
            self._hooks.pop(name).remove()
            self._hooked.remove(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base module, then add the active adapters in turn; returns `(..., width_out)`."""
        inputs, self._inputs = self._inputs, {}
        output = self.base_layer(*args, **kwargs)
        running = self.running()
        if not running:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        if "input" not in self._hooked and args:
            inputs = {**inputs, "input": args[0]}
        for name in running:
            source = self._source(self.configs[name], hidden, inputs)
            hidden = hidden + self._compute_adapter(name, source).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _source(
        self, config: LayerConfig, hidden: Tensor, inputs: dict[HookedInput, Tensor]
    ) -> Tensor:
        if config.hooked_input is None:
            return hidden
        if config.hooked_input not in inputs:
            raise RuntimeError(
                f"an adapter did not see the {config.hooked_input} of its feed-forward: the model "
                "computes without calling the module that is given it"
            )
        source = inputs[config.hooked_input]
        if config.input_type != "sum":
            return source
        total: Tensor = hidden + source
        return self._norm[0](total) if self._norm else total

    def _compute_adapter(self, name: str, source: Tensor) -> Tensor:
        """Returns s · up(f(down(source))): `(..., width_in)` -> `(..., width_out)`."""
        down, up, config = (
            self.bottleneck_down[name],
            self.bottleneck_up[name],
            self.configs[name],
        )
        inner = config.activation(
            down(self._cast_input_dtype(source, next(down.parameters()).dtype))
        )
        inner = nn.functional.dropout(inner, config.dropout, self.training)
        output: Tensor = up(inner) * config.scaling
        return output * self.bottleneck_scale[name] if name in self.bottleneck_scale else output

    def __repr__(self) -> str:
        return f"bottleneck.{super().__repr__()}"


def _store_input(
    layer: BottleneckLayer, input_name: HookedInput, _source: nn.Module, args: tuple[Any, ...]
) -> None:
    """Forward pre-hook: store a module's input as `input_name` if an active adapter reads it."""
    if any(layer.configs[name].hooked_input == input_name for name in layer.running()):
        layer._inputs[input_name] = args[0]


class BottleneckModel(UnmergeableTuner, PrecisionTuner, BaseTuner):
    """PEFT tuner that wraps the modules of a model in `BottleneckLayer`s."""

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(
        self, peft_config: BottleneckConfig, model_config: dict[str, Any]
    ) -> BottleneckConfig:
        message = get_placement_error(getattr(self.model, "config", None), peft_config.placement)
        if message:
            raise ValueError(f"{message}. Use placement houlsby, pfeiffer or parallel.")
        if peft_config.target_modules is None:
            positions = get_adapter_positions(getattr(self.model, "config", None))
            if positions is None:
                raise ValueError(
                    "no positions for bottleneck adapters are known for model_type "
                    f"{model_config.get('model_type')!r}, only for {', '.join(ADAPTER_POSITIONS)}. "
                    "Set target_modules to the last linear layers of its sub-layers."
                )
            peft_config.target_modules = target_pattern(positions, peft_config.placement)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target)
        width_in, width_out = self._widths(layer.get_base_layer())
        layer.in_features, layer.out_features = width_in, width_out
        input_type = self._connect(layer, peft_config.placement, current_key)
        if input_type == "input":
            source = self._input_of(current_key)
            if source is not None:
                width_in = self._widths(source)[0]
                layer.hook_input(source, "input")
        else:
            width_in = width_out
        layer.update_layer(
            adapter_name, peft_config, input_type=input_type, widths=(width_in, width_out)
        )
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _connect(self, layer: BottleneckLayer, placement: str, module_name: str) -> InputType:
        """Returns the input type of adapters of `placement`; registers hooks that it requires."""
        input_type = INPUT_TYPES.get(placement, "output")
        if input_type not in ("residual", "sum"):
            return input_type
        positions = get_adapter_positions(getattr(self.model, "config", None))
        block = block_of(positions, module_name)
        if positions is None or block is None:
            raise ValueError(
                f"placement {placement} reads the residual of a feed-forward, and {module_name} is "
                "not the end of one. Use placement houlsby, pfeiffer or parallel."
            )
        if placement == "adapter_plus" and positions.norm:
            return "output"  # the site is the norm, so the output is the normalized sum
        modules: dict[str, Any] = dict(self.model.named_modules())
        layer.hook_input(modules[block + positions.residual], "residual")
        if positions.norm:
            norm = modules[block + positions.norm]
            layer.set_norm(getattr(norm, "base_layer", norm))
        return input_type

    def _input_of(self, module_name: str) -> nn.Module | None:
        modules: dict[str, Any] = dict(self.model.named_modules())
        name = get_input_layer(
            get_adapter_positions(getattr(self.model, "config", None)), module_name, modules
        )
        if name is None:
            return None
        return getattr(modules[name], "base_layer", modules[name])

    def _widths(self, module: nn.Module) -> tuple[int, int]:
        for fan_in, fan_out in (("in_features", "out_features"), ("nx", "nf")):
            if hasattr(module, fan_in):
                return getattr(module, fan_in), getattr(module, fan_out)
        if not hasattr(self.model, "config"):
            raise ValueError(
                f"{type(module).__name__} does not expose its input and output size, and the "
                f"model has no config. Name linear layers in target_modules."
            )
        hidden = self.model.config.get_text_config().hidden_size
        return hidden, hidden

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Set `new_module` on `parent`; PEFT's own method requires `child.weight`."""
        if isinstance(child, BottleneckLayer) and new_module is not child:
            child.remove_hooks()
        setattr(parent, child_name, new_module)


register_tuner(BOTTLENECK, BottleneckConfig, BottleneckModel)
