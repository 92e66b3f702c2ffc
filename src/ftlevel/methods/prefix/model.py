"""The tuner: puts a `PrefixLayer` around every attention of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ftlevel.methods.prefix.attention import WITH_PREFIX, own_attention, register_attention
from ftlevel.methods.prefix.config import PrefixKvConfig
from ftlevel.methods.prefix.layer import PrefixLayer
from ftlevel.methods.prefix.sites import find_attentions, why_no_prefix
from ftlevel.methods.virtual_tokens import VirtualTokenTuner
from ftlevel.models.upstream.architectures import attention_of

_OURS = {ours: own for own, ours in WITH_PREFIX.items()}


class PrefixModel(VirtualTokenTuner):
    """Prefix tuning of a pretrained model, in all of its attentions.

    While it is on, the model computes attention by a function of ours, which calls that of the
    implementation it was loaded with: "eager" returns its weights, with those of the prefix in
    front, and "sdpa" has none. `unload` restores what was.
    """

    prefix: str = "prefix_kv_"
    tuner_layer_cls = PrefixLayer

    def find_modules(self) -> list[str]:
        """Return the full names of all attentions."""
        return find_attentions(self.model)

    def _pre_injection_hook(
        self,
        model: Any,
        config: PrefixKvConfig,  # noqa: ARG002 - PEFT's signature
        adapter_name: str,  # noqa: ARG002 - PEFT's signature
    ) -> None:
        """Remember the model's attention, and refuse one that ours could not stand in for."""
        reason = why_no_prefix(model.config)
        if reason:
            raise ValueError(f"{reason}. Use a method without a prefix, such as LoRA.")
        implementation = attention_of(model)
        if implementation not in {*WITH_PREFIX, *_OURS}:
            raise ValueError(
                f"prefix tuning cannot be used with attn_implementation={implementation!r}, only "
                f"with {' or '.join(WITH_PREFIX)}. Load the model with 'sdpa'."
            )
        # A config that another model with a prefix was made of names ours.
        self.attention_before = _OURS.get(implementation, implementation)

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
        wrapped = isinstance(target, PrefixLayer)
        layer: Any = target if wrapped else PrefixLayer(target)
        layer.in_features = layer.out_features = self._width()
        self._fill(layer, adapter_name, peft_config)
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

    def _fill(self, layer: PrefixLayer, adapter_name: str, config: PrefixKvConfig) -> None:
        """Add a prefix to `layer` (mutated)."""
        if not config.prefix_projection:
            layer.add_plain(adapter_name, config)
            return
        encoder = next((other for other in self.layers() if adapter_name in other.encoders), None)
        if encoder is not None:
            encoder = encoder.encoders[adapter_name]
        layer.add_projected(adapter_name, config, encoder, self._width())

    def _width(self) -> int:
        """Return the width of what goes into an attention, and comes out of it."""
        width: int = self.model.config.get_text_config().hidden_size
        return width

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, and let attentions that ask transformers for a function get ours."""
        super().inject_adapter(*args, **kwargs)
        if any(own_attention(layer.base_layer) is None for layer in self.layers()):
            register_attention()
            self.model.set_attn_implementation(WITH_PREFIX[self.attention_before])

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the last one gives the model back the attention it had."""
        super().delete_adapter(adapter_name)
        if not self.peft_config:
            self._restore_attention()

    def unload(self) -> nn.Module:
        """Return the base model without prefixes, with the attention it had."""
        model = super().unload()
        self._restore_attention()
        return model

    def _restore_attention(self) -> None:
        if attention_of(self.model) in _OURS:
            self.model.set_attn_implementation(self.attention_before)

    @torch.no_grad()
    def fold(self, adapter_name: str = "default") -> None:
        """Replace the MLP of an adapter by the keys and values that it computes (in place).

        "Once training is complete, these reparametrization parameters can be dropped" (Li &
        Liang, 2021, section 4.3).
        """
        config = self.peft_config[adapter_name]
        if not config.prefix_projection:
            return
        layers = [layer for layer in self.layers() if adapter_name in layer.encoders]
        computed = [layer.compute(adapter_name) for layer in layers]
        for layer, (keys, values) in zip(layers, computed, strict=True):
            layer.fold(adapter_name, keys, values)
        config.prefix_projection = False
