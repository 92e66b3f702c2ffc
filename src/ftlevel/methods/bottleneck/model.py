"""Tuner that wraps the adapter positions of a model with `BottleneckLayer`."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ftlevel.methods.base import UnmergeableTuner
from ftlevel.methods.bottleneck.layer import READS, BottleneckConfig, BottleneckLayer, Reads
from ftlevel.methods.bottleneck.sites import (
    SITES,
    block_of,
    find_input,
    site_pattern,
    sites_of,
    why_no_residual,
)
from ftlevel.methods.precision import PrecisionTuner


class BottleneckModel(UnmergeableTuner, PrecisionTuner, BaseTuner):
    """Tuner of bottleneck adapters."""

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(
        self, peft_config: BottleneckConfig, model_config: dict[str, Any]
    ) -> BottleneckConfig:
        reason = why_no_residual(getattr(self.model, "config", None), peft_config.placement)
        if reason:
            raise ValueError(f"{reason}. Use placement houlsby, pfeiffer or parallel.")
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
        parameter_name: str | None = None,  # noqa: ARG002 - PEFT's signature
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
        """Connect `layer` to the residual if needed (mutated); return what adapters read."""
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
            return "output"  # the site is the norm, so its output is the normalized sum
        modules: dict[str, Any] = dict(self.model.named_modules())
        layer.listen_to(modules[block + sites.residual], "residual")
        if sites.norm:
            norm = modules[block + sites.norm]
            layer.sum_through(getattr(norm, "base_layer", norm))
        return reads

    def _input_of(self, site: str) -> nn.Module | None:
        """Return the linear layer that receives the input of the feed-forward ending at `site`."""
        modules: dict[str, Any] = dict(self.model.named_modules())
        name = find_input(sites_of(getattr(self.model, "config", None)), site, modules)
        if name is None:
            return None
        return getattr(modules[name], "base_layer", modules[name])

    def _widths(self, module: nn.Module) -> tuple[int, int]:
        """Return a module's input and output widths; raises `ValueError` if unknown."""
        for fan_in, fan_out in (("in_features", "out_features"), ("nx", "nf")):
            if hasattr(module, fan_in):
                return getattr(module, fan_in), getattr(module, fan_out)
        if not hasattr(self.model, "config"):
            raise ValueError(
                f"{type(module).__name__} does not say how wide its input and output are, and the "
                "model has no config. Name linears in target_modules."
            )
        hidden = self.model.config.get_text_config().hidden_size
        return hidden, hidden

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Set `new_module` on `parent`; PEFT's version requires `child.weight`."""
        if isinstance(child, BottleneckLayer) and new_module is not child:
            child.stop_listening()
        setattr(parent, child_name, new_module)
