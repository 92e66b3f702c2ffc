"""Prefix tuning: config, layer and tuner; P learned key-value pairs that every query attends to.

    out = softmax([q Kₚᵀ, q Kᵀ + bias] · scale) · [Vₚ; V]         Li & Liang, 2021, § 4.2
    plain:      Kₚ, Vₚ = parameters, each (P, kv_heads · head_dim)
    projected:  [Kₚ; Vₚ] = W₂ tanh(W₁ E),  E (P, hidden) and W₁ shared by all attention modules
                                                                  section 4.3

The prefix is prepended on the key axis inside the attention only, so hidden states, positions,
labels and the cache keep their lengths. It has no position: no rotary embedding, zero relative
bias, and no causal or sliding mask. It is added through transformers' `AttentionInterface`; GPT-Neo
and DeBERTa-v2 do not use that, so their attention is reimplemented here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftlevel.methods.prefix import get_attention_modules, get_prefix_error
from ftlevel.methods.tuners import TargetConfig, VirtualTokenLayer, VirtualTokenTuner, device_of
from ftlevel.methods.upstream import add_peft_type, register_tuner
from ftlevel.models.upstream.architectures import (
    attention_of,
    create_sdpa_mask,
    eager_attention_of,
)

ATTENTION = "ftlevel_prefix"
EAGER_ATTENTION = "ftlevel_prefix_eager"
"""Names of ftlevel's functions in transformers' `AttentionInterface`."""
WITH_PREFIX = {"sdpa": ATTENTION, "eager": EAGER_ATTENTION}
"""Attention implementation -> ftlevel's equivalent with a prefix."""

Prefix = tuple[Tensor, Tensor]
"""Keys and values, each `(1, kv_heads, P, head_dim)`."""


def register_attention() -> None:
    """Register ftlevel's attention functions in transformers, with SDPA's and eager's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, prefix_attention_forward)
    AttentionMaskInterface.register(ATTENTION, create_sdpa_mask)
    AttentionInterface.register(EAGER_ATTENTION, eager_prefix_attention_forward)
    AttentionMaskInterface.register(EAGER_ATTENTION, eager_mask)


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix: Prefix | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Returns scaled dot-product attention over `prefix` and the keys.

    Args:
        module: attention module, which has the number of key-value groups.
        query: `(batch, heads, queries, head_dim)`, after rotary embedding.
        key: `(batch, kv_heads, keys, head_dim)`, including the cache.
        value: same shape as `key`.
        attention_mask: `(batch, 1, queries, keys)`, boolean or additive; None is causal or full.
        prefix: learned keys and values; None computes plain attention.
        position_bias: `(1, heads, queries, keys)` of T5.
        kwargs: arguments of transformers' function.

    Returns:
        `(batch, queries, heads, head_dim)`, and None for the weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, position_bias=position_bias, **kwargs
        )
    length = prefix[0].shape[2]
    key, value = _prepend(prefix, key, value)
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    in_front = 0
    if attention_mask is not None:
        attention_mask = functional.pad(
            attention_mask, (length, 0), value=attention_mask.dtype == torch.bool
        )
    elif is_causal and query.shape[2] > 1:
        # Prepend as many queries as keys, so the maskless causal kernel stays correct.
        # Their outputs are dropped.
        in_front = length
        query = functional.pad(query, (0, 0, length, 0))
    if position_bias is not None:
        position_bias = functional.pad(position_bias, (length, 0, in_front, 0))
    output, weights = sdpa_attention_forward(
        module, query, key, value, attention_mask, position_bias=position_bias, **kwargs
    )
    return output[:, in_front:], weights


def eager_prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix: Prefix | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Returns attention over `prefix` and the keys by the model's own eager function.

    Arguments are as for `prefix_attention_forward`, but `attention_mask` is additive. The output is
    `(batch, queries, heads, head_dim)`, the weights are `(batch, heads, queries, P + keys)`.
    """
    if prefix is not None:
        length = prefix[0].shape[2]
        key, value = _prepend(prefix, key, value)
        if attention_mask is not None:
            attention_mask = functional.pad(attention_mask, (length, 0))
        if position_bias is not None:
            position_bias = functional.pad(position_bias, (length, 0))
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    return eager_attention_of(module)(module, query, key, value, attention_mask, **kwargs)


def _prepend(prefix: Prefix, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    key, value = (
        torch.cat([extra.to(states.dtype).expand(len(states), -1, -1, -1), states], dim=2)
        for extra, states in zip(prefix, (key, value), strict=True)
    )
    return key, value


def gpt_neo_attention(
    module: Any,
    prefix: Prefix,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    layer_past: Any = None,
    **_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Reimplement `GPTNeoSelfAttention.forward` (transformers 5.24) with `prefix`.

    Logits are unscaled and in float32; the buffer `bias` is the causal or local mask.
    """
    shape = (*hidden_states.shape[:-1], module.num_heads, module.head_dim)
    query, key, value = (
        linear(hidden_states).view(shape).transpose(1, 2)
        for linear in (module.q_proj, module.k_proj, module.v_proj)
    )
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_id)
    queries, keys = query.shape[-2], key.shape[-2]
    scores = query.float() @ key.float().transpose(-1, -2)
    seen = module.bias[:, :, keys - queries : keys, :keys]
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if attention_mask is not None:
        scores = scores + attention_mask
    on_prefix = query.float() @ prefix[0].float().transpose(-1, -2)
    weights = torch.cat([on_prefix, scores], dim=-1).softmax(-1).to(value.dtype)
    weights = module.attn_dropout(weights)
    values = torch.cat([prefix[1].to(value.dtype).expand(len(value), -1, -1, -1), value], dim=2)
    output = (weights @ values).transpose(1, 2).flatten(2)
    return module.resid_dropout(module.out_proj(output)), weights


def deberta_attention(
    module: Any,
    prefix: Prefix,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Reimplement `DisentangledSelfAttention.forward` (transformers 5.24) with `prefix`.

    Prefix keys have no position, so only the content-to-content term applies (He et al., 2021,
    DeBERTa, equation 2).
    """
    heads = module.num_attention_heads
    source = hidden_states if query_states is None else query_states
    query = module.transpose_for_scores(module.query_proj(source), heads)
    key = module.transpose_for_scores(module.key_proj(hidden_states), heads)
    value = module.transpose_for_scores(module.value_proj(hidden_states), heads)
    terms = 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)
    scale = math.sqrt(query.shape[-1] * terms)
    scores = query @ (key.transpose(-1, -2) / scale)
    if module.relative_attention:
        scores = scores + module.disentangled_attention_bias(
            query, key, relative_pos, module.pos_dropout(rel_embeddings), terms
        )
    batch = len(hidden_states)
    scores, query, value = (
        states.view(batch, heads, *states.shape[1:]) for states in (scores, query, value)
    )
    scores = scores.masked_fill(~attention_mask.bool(), torch.finfo(query.dtype).min)
    on_prefix = query @ (prefix[0].to(query.dtype).transpose(-1, -2) / scale)
    weights = module.dropout(torch.cat([on_prefix, scores], dim=-1).softmax(-1))
    values = torch.cat([prefix[1].to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)
    return (weights @ values).transpose(1, 2).flatten(2), weights if output_attentions else None


_MODELS = "transformers.models"
CUSTOM_ATTENTION: dict[str, Callable[..., Any]] = {
    f"{_MODELS}.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": gpt_neo_attention,
    f"{_MODELS}.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention": deberta_attention,
}
"""Attention classes that do not use `AttentionInterface`, by full class name."""


def custom_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Returns the replacement of `module.forward` (for GPT-Neo and DeBERTa-v2), or None."""
    return CUSTOM_ATTENTION.get(f"{type(module).__module__}.{type(module).__qualname__}")


PREFIX_KV = add_peft_type("PREFIX_KV")


@dataclass
class PrefixKvConfig(TargetConfig):
    """Configuration of `PrefixModel`.

    Attributes:
        num_virtual_tokens: prefix length of each attention module.
        prefix_projection: whether an MLP computes the prefix, until `PrefixModel.fold`.
        encoder_hidden_size: hidden size of that MLP.
    """

    num_virtual_tokens: int = field(default=20)
    prefix_projection: bool = field(default=False)
    encoder_hidden_size: int = field(default=512)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PREFIX_KV


INIT_STD = 0.02


class PrefixLayer(VirtualTokenLayer):
    """PEFT layer: an attention module, `base_layer`, whose queries also attend to prefixes.

    The prefixes of the active adapters are concatenated. Other attributes are `base_layer`'s.
    """

    base_layer: Any

    adapter_layer_names = (
        "prefix_kv_keys",
        "prefix_kv_values",
        "prefix_kv_embedding",
        "prefix_kv_hidden",
        "prefix_kv_output",
    )
    other_param_names = ("configs", "encoders")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prefix_kv_keys = nn.ParameterDict()
        self.prefix_kv_values = nn.ParameterDict()
        self.prefix_kv_embedding = nn.ParameterDict()
        self.prefix_kv_hidden = nn.ModuleDict()
        self.prefix_kv_output = nn.ModuleDict()
        # Layer that owns E and W₁; a plain dict, so they are registered only there.
        self.encoders: dict[str, PrefixLayer] = {}
        self.kv_heads, self.head_dim = kv_shape(base_layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def add_prefix(self, adapter_name: str, config: PrefixKvConfig) -> None:
        """Add an adapter: a prefix of randomly initialized keys and values."""
        shape = (config.num_virtual_tokens, self.kv_heads * self.head_dim)
        for parameters in (self.prefix_kv_keys, self.prefix_kv_values):
            states = torch.empty(shape, device=device_of(self.base_layer), dtype=torch.float32)
            parameters[adapter_name] = nn.Parameter(nn.init.normal_(states, std=INIT_STD))

    def add_mlp_prefix(
        self, adapter_name: str, config: PrefixKvConfig, encoder: PrefixLayer | None, hidden: int
    ) -> None:
        """Add an adapter whose prefix an MLP with input size `hidden` computes.

        The first layer of the MLP is shared: `encoder` has it, or if that is None, this layer.
        """
        device, width = device_of(self.base_layer), config.encoder_hidden_size
        if encoder is None:
            encoder = self
            embedding = torch.randn(config.num_virtual_tokens, hidden, device=device)
            self.prefix_kv_embedding[adapter_name] = nn.Parameter(embedding)
            self.prefix_kv_hidden[adapter_name] = nn.Linear(hidden, width, device=device)
        self.encoders[adapter_name] = encoder
        self.prefix_kv_output[adapter_name] = nn.Linear(
            width, 2 * self.kv_heads * self.head_dim, device=device
        )

    def compute(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of an adapter, each `(P, kv_heads · head_dim)`."""
        if adapter_name in self.prefix_kv_keys:
            return self.prefix_kv_keys[adapter_name], self.prefix_kv_values[adapter_name]
        encoder = self.encoders[adapter_name]
        embedding = encoder.prefix_kv_embedding[adapter_name]
        hidden = torch.tanh(encoder.prefix_kv_hidden[adapter_name](embedding))
        keys, values = self.prefix_kv_output[adapter_name](hidden).chunk(2, dim=-1)
        return keys, values

    def fold(self, adapter_name: str, keys: Tensor, values: Tensor) -> None:
        """Replace the MLP of an adapter by the `keys` and `values` that it computes."""
        for parameters, states in ((self.prefix_kv_keys, keys), (self.prefix_kv_values, values)):
            parameters[adapter_name] = nn.Parameter(states.detach().float().clone())
        for name in ("prefix_kv_embedding", "prefix_kv_hidden", "prefix_kv_output", "encoders"):
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]

    def prefix_of(self, names: list[str]) -> Prefix:
        """Returns the adapters' keys and values, each `(1, kv_heads, sum of lengths, head_dim)`."""
        key_values = [self.compute(name) for name in names]
        keys, values = (
            torch.cat(part).view(1, -1, self.kv_heads, self.head_dim).transpose(1, 2)
            for part in zip(*key_values, strict=True)
        )
        return keys, values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention with the prefixes of the active adapters."""
        names = self.running()
        if not names:
            return self.base_layer(*args, **kwargs)
        prefix = self.prefix_of(names)
        if (attention := custom_attention(self.base_layer)) is not None:
            return attention(self.base_layer, prefix, *args, **kwargs)
        return self.base_layer(*args, prefix=prefix, **kwargs)


def kv_shape(attention: nn.Module) -> tuple[int, int]:
    """Returns the number of key-value heads of an attention module, and the width of a head."""
    config = getattr(attention, "config", None)
    heads = _first(attention, ("n_heads", "num_heads", "num_attention_heads"))
    if heads is None and config is not None:
        heads = config.num_attention_heads
    width = _first(
        attention, ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    )
    if not heads or not width:
        raise ValueError(
            f"{type(attention).__name__} does not expose its number of heads and their size, so "
            f"a prefix cannot be added. Name attention modules in target_modules, or drop it."
        )
    return heads // (_first(attention, ("num_key_value_groups",)) or 1), width


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


_WITHOUT_PREFIX = {ours: own for own, ours in WITH_PREFIX.items()}


class PrefixModel(VirtualTokenTuner):
    """Tuner for prefix tuning of all attention modules of a model.

    Until `unload`, the model uses ftlevel's attention functions; it can return attention weights
    only with `attn_implementation="eager"`.
    """

    prefix: str = "prefix_kv_"
    tuner_layer_cls = PrefixLayer

    def default_target_modules(self) -> list[str]:
        """Returns the full names of all attention modules."""
        return get_attention_modules(self.model)

    def _pre_injection_hook(self, model: Any, config: PrefixKvConfig, adapter_name: str) -> None:
        """Store the model's attention implementation; raise `ValueError` if it is unsupported."""
        message = get_prefix_error(model.config)
        if message:
            raise ValueError(f"{message}. Use a method without a prefix, such as LoRA.")
        implementation = attention_of(model)
        if implementation not in {*WITH_PREFIX, *_WITHOUT_PREFIX}:
            raise ValueError(
                f"prefix tuning cannot be used with attn_implementation={implementation!r}, only "
                f"with {' or '.join(WITH_PREFIX)}. Load the model with 'sdpa'."
            )
        # A config reused from a different model with a prefix names ftlevel's attention.
        self.attention_before = _WITHOUT_PREFIX.get(implementation, implementation)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        wrapped = isinstance(target, PrefixLayer)
        layer: Any = target if wrapped else PrefixLayer(target)
        layer.in_features = layer.out_features = self._width()
        layer.configs[adapter_name] = peft_config
        self._fill(layer, adapter_name, peft_config)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if not wrapped:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Set `new_module` on `parent`; PEFT's own method requires `child.weight`."""
        setattr(parent, child_name, new_module)

    def _fill(self, layer: PrefixLayer, adapter_name: str, config: PrefixKvConfig) -> None:
        if not config.prefix_projection:
            layer.add_prefix(adapter_name, config)
            return
        encoder = next((other for other in self.layers() if adapter_name in other.encoders), None)
        if encoder is not None:
            encoder = encoder.encoders[adapter_name]
        layer.add_mlp_prefix(adapter_name, config, encoder, self._width())

    def _width(self) -> int:
        return self.model.config.get_text_config().hidden_size

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter and switch the model to ftlevel's attention functions if needed."""
        super().inject_adapter(*args, **kwargs)
        if any(custom_attention(layer.base_layer) is None for layer in self.layers()):
            register_attention()
            self.model.set_attn_implementation(WITH_PREFIX[self.attention_before])

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; after the last one, restore the original attention."""
        super().delete_adapter(adapter_name)
        if not self.peft_config:
            self._reset_attention()

    def unload(self) -> nn.Module:
        """Returns the base model with its original attention."""
        model = super().unload()
        self._reset_attention()
        return model

    def _reset_attention(self) -> None:
        if attention_of(self.model) in _WITHOUT_PREFIX:
            self.model.set_attn_implementation(self.attention_before)

    @torch.no_grad()
    def fold(self, adapter_name: str = "default") -> None:
        """Replace the MLP of an adapter by the keys and values that it computes (in place)."""
        config = self.peft_config[adapter_name]
        if not config.prefix_projection:
            return
        layers = [layer for layer in self.layers() if adapter_name in layer.encoders]
        key_values = [layer.compute(adapter_name) for layer in layers]
        for layer, (keys, values) in zip(layers, key_values, strict=True):
            layer.fold(adapter_name, keys, values)
        config.prefix_projection = False


register_tuner(PREFIX_KV, PrefixKvConfig, PrefixModel)
