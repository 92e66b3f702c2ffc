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
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ftlevel.config.methods.other import REDUCTION_FACTOR, Placement, default_scaling
from ftlevel.methods.base import UnmergeableLayer, UnmergeableTuner
from ftlevel.methods.bottleneck import (
    CANNOT_MERGE,
    SITES,
    block_of,
    find_input,
    site_pattern,
    sites_of,
    why_no_residual,
)
from ftlevel.methods.tuners import PrecisionLayer, PrecisionTuner, use_sets
from ftlevel.methods.upstream import add_peft_type, register_tuner

BOTTLENECK = add_peft_type("BOTTLENECK")


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of `BottleneckModel`.

    Attributes:
        placement: houlsby, pfeiffer, seq_bn, parallel, par_bn or adapter_plus.
        bottleneck_dim: bottleneck width; None uses `reduction_factor`.
        reduction_factor: hidden size / bottleneck width.
        non_linearity: activation function, as named in transformers.
        adapter_dropout: dropout on the bottleneck activations.
        scaling: factor of the adapter's output, `learned`, or `channel`; None is 4 for parallel
            and par_bn, channel for adapter_plus and 1 otherwise.
        target_modules: names or one regular expression; None uses the family's positions.
        exclude_modules: excluded names or one regular expression.
        modules_to_save: modules that are fully trained and saved.
        init_weights: initialize adapters to change nothing; False randomizes up, too, for tests.
    """

    placement: str = field(default="houlsby")
    bottleneck_dim: int | None = field(default=None)
    reduction_factor: float = field(default=REDUCTION_FACTOR)
    non_linearity: str = field(default="relu")
    adapter_dropout: float = field(default=0.0)
    scaling: float | str | None = field(default=None)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
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
                f"non_linearity {self.non_linearity!r} is no activation of transformers, such as "
                "relu, gelu or silu."
            )
        if self.scaling is None:
            self.scaling = default_scaling(self.placement)
        if isinstance(self.scaling, str) and self.scaling not in ("learned", "channel"):
            raise ValueError(f"scaling {self.scaling!r} is not a number, learned or channel.")
        use_sets(self)


Listens = Literal["input", "residual"]
Reads = Literal["output", "input", "residual", "sum"]
READS: dict[str, Reads] = {
    "parallel": "input",
    "par_bn": "residual",
    "seq_bn": "sum",
    "adapter_plus": "sum",
}
"""Placement -> adapter input, if it is not the module's output."""


@dataclass(frozen=True)
class AdapterSettings:
    """Non-trainable settings of one adapter: input, activation, dropout and constant scaling."""

    reads: Reads
    activation: Callable[[Tensor], Tensor]
    dropout: float
    scaling: float

    @property
    def listens(self) -> Listens | None:
        """Which input the adapter needs from a hook; None if it reads the module's output."""
        if self.reads == "output":
            return None
        return "input" if self.reads == "input" else "residual"


class BottleneckLayer(UnmergeableLayer, PrecisionLayer, nn.Module, BaseTunerLayer):
    """A module of the base with its adapters, by adapter name.

    The two linear layers are in separate `ModuleDict`s because PEFT replaces adapter names in
    state-dict keys only in the last two positions. The module is a linear layer of any library,
    or a feed-forward that returns its hidden states alone or first in a tuple.
    """

    cannot_merge = CANNOT_MERGE
    adapter_layer_names = ("bottleneck_down", "bottleneck_up", "bottleneck_scale")
    other_param_names = ("settings",)
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
        self.settings: dict[str, AdapterSettings] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._taps: dict[Listens, Any] = {}
        self._listens: list[Listens] = []  # readable by torch.compile, unlike hooks
        self._tapped: dict[Listens, Tensor] = {}
        # In a list, so that the norm is not registered as a submodule here.
        self._norm: list[nn.Module] = []

    def update_layer(
        self, adapter_name: str, config: BottleneckConfig, *, reads: Reads, widths: tuple[int, int]
    ) -> None:
        """Add an adapter in float32 on the module's device, initialized as the identity.

        The up-projection is zero, as in He et al. (2022); Houlsby et al. use N(0, 0.01²) for both.
        `reads` is the kind of the adapter's input; `widths` are the widths of input and output.
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
        self.settings[adapter_name] = AdapterSettings(
            reads=reads,
            activation=ACT2FN[config.non_linearity],
            dropout=config.adapter_dropout,
            scaling=config.scaling if isinstance(config.scaling, (int, float)) else 1.0,
        )
        if learned is not None:
            ones = torch.ones(learned, dtype=torch.float32, device=up.weight.device)
            self.bottleneck_scale[adapter_name] = nn.Parameter(ones)

    def listen_to(self, source: nn.Module, kind: Listens) -> None:
        """Register a hook that stores the input of `source` for adapters that read `kind`.

        `source` must run before `base_layer` in every forward pass; with gradient checkpointing
        both are recomputed.
        """
        if kind not in self._taps:
            hook = functools.partial(_remember, self, kind)
            self._taps[kind] = source.register_forward_pre_hook(hook)
            self._listens.append(kind)

    def sum_through(self, norm: nn.Module) -> None:
        """Normalize the sum of output and residual with `norm` before adapters read it."""
        self._norm = [norm]

    def stop_listening(self) -> None:
        """Remove all hooks."""
        for hook in self._taps.values():
            hook.remove()
        self._taps, self._listens, self._norm = {}, [], []

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and the hooks that only it needs."""
        super().delete_adapter(adapter_name)
        needed = {setting.listens for setting in self.settings.values()}
        for kind in [kind for kind in self._taps if kind not in needed]:
            self._taps.pop(kind).remove()
            self._listens.remove(kind)

    def running(self) -> list[str]:
        """Returns the active adapters of this layer."""
        if self.disable_adapters:
            return []
        active: list[str] = self.active_adapters  # type: ignore[assignment]  # a PEFT property
        return [name for name in active if name in self.settings]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, then its active adapters in sequence; returns `(..., width_out)`."""
        tapped, self._tapped = self._tapped, {}
        output = self.base_layer(*args, **kwargs)
        running = self.running()
        if not running:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        if "input" not in self._listens and args:
            tapped = {**tapped, "input": args[0]}
        for name in running:
            source = self._source(self.settings[name], hidden, tapped)
            hidden = hidden + self._adapt(name, source).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _source(
        self, setting: AdapterSettings, hidden: Tensor, tapped: dict[Listens, Tensor]
    ) -> Tensor:
        """Returns the adapter's input `(..., width_in)`: `hidden`, a hooked input, or the sum."""
        if setting.listens is None:
            return hidden
        if setting.listens not in tapped:
            raise RuntimeError(
                f"an adapter did not see the {setting.listens} of its feed-forward: the model "
                "computes without calling the module that is given it"
            )
        source = tapped[setting.listens]
        if setting.reads != "sum":
            return source
        total: Tensor = hidden + source
        return self._norm[0](total) if self._norm else total

    def _adapt(self, name: str, source: Tensor) -> Tensor:
        """Returns s · up(f(down(source))): `(..., width_in)` -> `(..., width_out)`."""
        down, up, setting = (
            self.bottleneck_down[name],
            self.bottleneck_up[name],
            self.settings[name],
        )
        inner = setting.activation(down(self._cast_input_dtype(source, _dtype(down))))
        inner = nn.functional.dropout(inner, setting.dropout, self.training)
        output: Tensor = up(inner) * setting.scaling
        return output * self.bottleneck_scale[name] if name in self.bottleneck_scale else output

    def __repr__(self) -> str:
        return f"bottleneck.{super().__repr__()}"


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _remember(
    layer: BottleneckLayer, kind: Listens, _source: nn.Module, args: tuple[Any, ...]
) -> None:
    """Hook: store a module's input as `kind` until `layer` runs, if an active adapter needs it."""
    if any(layer.settings[name].listens == kind for name in layer.running()):
        layer._tapped[kind] = args[0]


class BottleneckModel(UnmergeableTuner, PrecisionTuner, BaseTuner):
    """Tuner of bottleneck adapters."""

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(
        self, peft_config: BottleneckConfig, model_config: dict[str, Any]
    ) -> BottleneckConfig:
        error = why_no_residual(getattr(self.model, "config", None), peft_config.placement)
        if error:
            raise ValueError(f"{error}. Use placement houlsby, pfeiffer or parallel.")
        if peft_config.target_modules is None:
            sites = sites_of(getattr(self.model, "config", None))
            if sites is None:
                raise ValueError(
                    f"no positions for bottleneck adapters are known for model_type "
                    f"{model_config.get('model_type')!r}, only for {', '.join(SITES)}. Set "
                    "target_modules to the last linears of its sub-layers."
                )
            peft_config.target_modules = site_pattern(sites, peft_config.placement)
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
        reads = self._connect(layer, peft_config.placement, current_key)
        if reads == "input":
            source = self._input_of(current_key)
            if source is not None:
                width_in = self._widths(source)[0]
                layer.listen_to(source, "input")
        else:
            width_in = width_out
        layer.update_layer(adapter_name, peft_config, reads=reads, widths=(width_in, width_out))
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _connect(self, layer: BottleneckLayer, placement: str, site: str) -> Reads:
        """Connect `layer` (modified) to the residual if needed; returns its adapters' input."""
        reads = READS.get(placement, "output")
        if reads not in ("residual", "sum"):
            return reads
        sites = sites_of(getattr(self.model, "config", None))
        block = block_of(sites, site)
        if sites is None or block is None:
            raise ValueError(
                f"placement {placement} reads the residual of a feed-forward, and {site} is not "
                "the end of one. Use placement houlsby, pfeiffer or parallel."
            )
        if placement == "adapter_plus" and sites.norm:
            return "output"  # the site is the norm, so the output is the normalized sum
        modules: dict[str, Any] = dict(self.model.named_modules())
        layer.listen_to(modules[block + sites.residual], "residual")
        if sites.norm:
            norm = modules[block + sites.norm]
            layer.sum_through(getattr(norm, "base_layer", norm))
        return reads

    def _input_of(self, site: str) -> nn.Module | None:
        """Returns the module that `find_input` names for `site`, or None."""
        modules: dict[str, Any] = dict(self.model.named_modules())
        name = find_input(sites_of(getattr(self.model, "config", None)), site, modules)
        if name is None:
            return None
        return getattr(modules[name], "base_layer", modules[name])

    def _widths(self, module: nn.Module) -> tuple[int, int]:
        """Returns a module's input and output widths; raises `ValueError` if unknown."""
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
        """Set `new_module` on `parent`; PEFT's own function requires `child.weight`."""
        if isinstance(child, BottleneckLayer) and new_module is not child:
            child.stop_listening()
        setattr(parent, child_name, new_module)


register_tuner(BOTTLENECK, BottleneckConfig, BottleneckModel)
