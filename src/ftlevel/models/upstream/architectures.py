"""Undocumented attributes of transformers classes, configs and models.

Imports no bitsandbytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ftlevel.models.upstream.tensors import is_on_gpu

attention_of = attrgetter("config._attn_implementation")
unsaved_names = attrgetter("_keys_to_ignore_on_save")  # or None
supports_sdpa = attrgetter("_supports_sdpa")
supports_flash = attrgetter("_supports_flash_attn")
tied_names = attrgetter("all_tied_weights_keys")
"""Tied tensor name -> name of the tensor that it shares."""


def set_attention_name(model: Any, name: str) -> None:
    """Set the registered attention `name`, for which `set_attn_implementation` wants flash-attn.

    transformers 5.24 looks for the package, or for a kernel on the Hub, if "flash" is in the name.
    """
    model.config._attn_implementation = name


def model_classes(auto_class: str) -> Mapping[type, Any]:
    """Returns the mapping of `auto_class` from config class to model class (for Funnel a tuple)."""
    import transformers

    return getattr(transformers, auto_class)._model_mapping


def has_masked_lm(model_type: str) -> bool:
    """Returns whether models of this type have a masked-LM head in transformers."""
    from transformers.models.auto import modeling_auto

    return model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def modules_in_float32(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """Returns name parts of modules that stay in float32 if `model` is loaded in `dtype`."""
    if dtype == torch.float32:
        return frozenset()
    names = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    return frozenset(names)


def uses_attention_interface(model_class: Any) -> bool:
    """Returns whether the class uses transformers' `AttentionInterface`."""
    return hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")


def create_sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Returns SDPA's mask of padded rows, in training on a GPU without waiting for its values.

    transformers omits a mask that hides nothing, so the host waits until the GPU has computed that.
    """
    from transformers.masking_utils import sdpa_mask

    padding = kwargs.get("attention_mask")
    if padding is not None and is_on_gpu(padding) and torch.is_grad_enabled():
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def eager_attention_of(module: Any) -> Any:
    """Returns transformers' `eager_attention_forward` for an attention module."""
    return sys.modules[type(module).__module__].eager_attention_forward


def forget_renaming(model: Any, mapping: Mapping[str, str]) -> None:
    """Make `save_pretrained` of `model` (modified) keep the names that `mapping` introduced."""
    model._weight_conversions = [
        conversion
        for conversion in model._weight_conversions
        if set(mapping).isdisjoint(getattr(conversion, "source_patterns", ()))
    ]


def forget_gguf(model: Any) -> None:
    """Remove .gguf attributes, with which `save_pretrained` fails, from `model` (modified)."""
    for holder, names in (
        (model, ("hf_quantizer", "quantization_method", "is_quantized")),
        (model.config, ("quantization_config",)),
    ):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)


def llama3_frequencies(config: Any) -> Tensor:
    """Returns the rotary frequencies of a config with rope_type llama3, `(head_dim / 2,)`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return torch.as_tensor(frequencies)


BLOCK = 64
"""Number of weights that share a scale."""
NAMES = ("gate_up_proj", "down_proj")
"""Tensors of a module of experts, `(experts, out, in)`."""

_EXPERT_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def can_pack(module: Any) -> bool:
    """Returns whether experts can be packed in 4-bit: gated, no biases, sizes in whole blocks."""
    parameters: dict[str, Any] = getattr(module, "_parameters", {})
    experts = [parameters[name] for name in NAMES if parameters.get(name) is not None]
    if [tensor.dim() for tensor in experts] != [3, 3]:
        return False
    # None for a custom forward
    attributes = [getattr(module, name, None) for name in _EXPERT_ATTRIBUTES]
    is_supported = attributes == [True, False, False, False]
    return is_supported and all(tensor[0].numel() % BLOCK == 0 for tensor in experts)


def packable_experts(model: Any) -> Iterator[str]:
    """Yields the names of the expert tensors of `model` that can be packed in 4-bit."""
    for owner, module in model.named_modules():
        if can_pack(module):
            yield from (f"{owner}.{name}" for name in NAMES)
