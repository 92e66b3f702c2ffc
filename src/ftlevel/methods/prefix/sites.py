"""Find attention modules, and check whether a model supports prefixes."""

from __future__ import annotations

from typing import Any

_WRAPPED = ".base_layer"


def find_attentions(model: Any) -> list[str]:
    """Return the full names of all self- and cross-attention modules of `model`.

    These are the innermost modules with an attention class name, such as BERT's `attention.self`.
    """
    names = [name for name, part in model.named_modules() if "Attention" in type(part).__name__]
    innermost = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    return [name.removesuffix(_WRAPPED) for name in innermost]


def why_no_prefix(config: Any) -> str | None:
    """Return why a model with `config` does not support prefixes, or None."""
    from transformers import MODEL_MAPPING

    from ftlevel.methods.prefix.attention import OWN_ATTENTION
    from ftlevel.models.upstream.architectures import asks_for_attention, supports_sdpa

    name = config.model_type
    if type(config) not in MODEL_MAPPING:
        return f"{name} is not a model of transformers, and how it computes attention is not known"
    architecture = MODEL_MAPPING[type(config)]
    if isinstance(architecture, (list, tuple)):
        architecture = architecture[0]
    module = architecture.__module__
    if any(known.startswith(f"{module}.") for known in OWN_ATTENTION):
        return None
    if not asks_for_attention(architecture):
        return (
            f"{name} computes its attention itself and does not ask transformers' "
            "AttentionInterface for it, so there is no place for a prefix"
        )
    if not supports_sdpa(architecture):
        return (
            f"the attention of {name} is more than scaled_dot_product_attention computes, which "
            "is what a prefix goes through"
        )
    if getattr(config.get_text_config(), "kv_lora_rank", None):
        return f"{name} has keys and values of unequal width (latent attention)"
    return None
