"""What transformers knows of a class, a config or a model, and says to nobody.

Which experts can be packed in 4 bits; imports no bitsandbytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch

attention_of = attrgetter("config._attn_implementation")
unsaved_names = attrgetter("_keys_to_ignore_on_save")  # or None
supports_sdpa = attrgetter("_supports_sdpa")
tied_names = attrgetter("all_tied_weights_keys")
"""Name of a tensor of a model → name of the one that it is."""


def model_classes(auto_class: str) -> Mapping[type, Any]:
    """Return class of config → class of model, as `auto_class` chooses; Funnel has a tuple."""
    import transformers

    classes: Mapping[type, Any] = getattr(transformers, auto_class)._model_mapping
    return classes


def has_masked_lm(model_type: str) -> bool:
    """Whether models of this type have a masked-LM head in transformers."""
    from transformers.models.auto import modeling_auto

    return model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def modules_in_float32(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """Return what stays in float32 when `model` is loaded in `dtype`: last parts of names."""
    if dtype == torch.float32:
        return frozenset()
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    return frozenset(kept)


def is_stateful(model: Any) -> bool:
    """Whether transformers says that a state goes from token to token."""
    return bool(getattr(model, "_is_stateful", False))  # only its own classes have the mark


def asks_for_attention(model_class: Any) -> bool:
    """Whether the module of `model_class` looks its attention up in `AttentionInterface`."""
    return hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")


def eager_attention_of(module: Any) -> Any:
    """Return the function that computes `module`, an attention, where "eager" is asked for."""
    return sys.modules[type(module).__module__].eager_attention_forward


def forget_renaming(model: Any, mapping: Mapping[str, str]) -> None:
    """Let `save_pretrained` write the names of the model's own class, which loads without help.

    transformers keeps a `key_mapping` to write the names that it read.
    """
    model._weight_conversions = [
        conversion
        for conversion in model._weight_conversions
        if set(mapping).isdisjoint(getattr(conversion, "source_patterns", ()))
    ]


def forget_gguf(model: Any) -> None:
    """Make a model read from .gguf a plain one: its weights are dequantized already.

    transformers leaves marks that make `save_pretrained` refuse.
    """
    for holder, names in (
        (model, ("hf_quantizer", "quantization_method", "is_quantized")),
        (model.config, ("quantization_config",)),
    ):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)


def llama3_frequencies(config: Any) -> torch.Tensor:
    """Return the rotary frequencies of a `config` with rope_type llama3, `(width / 2,)`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return torch.as_tensor(stretched)


BLOCK = 64
"""Weights that share a scale."""
NAMES = ("gate_up_proj", "down_proj")
"""The tensors of a module of experts, (experts, out, in)."""

_KIND = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def can_pack(module: Any) -> bool:
    """Whether `module` holds experts that `forward` multiplies: gated, without biases.

    Each expert's weights must fill blocks of their own, which share a scale.
    """
    held: dict[str, Any] = getattr(module, "_parameters", {})
    own = [held[name] for name in NAMES if held.get(name) is not None]
    if [tensor.dim() for tensor in own] != [3, 3]:
        return False
    kind = [getattr(module, name, None) for name in _KIND]  # None where its forward is its own
    plain = kind == [True, False, False, False]
    return plain and all(tensor[0].numel() % BLOCK == 0 for tensor in own)


def packable_experts(model: Any) -> Iterator[str]:
    """Yield the names of the experts' tensors of `model` that are packed in 4 bits."""
    for owner, module in model.named_modules():
        if can_pack(module):
            yield from (f"{owner}.{name}" for name in NAMES)
