"""Which modules of a model are attentions, and whether a prefix can be put into them."""

from __future__ import annotations

from typing import Any

_WRAPPED = ".base_layer"


def find_attentions(model: Any) -> list[str]:
    """Return the full names of the attentions of `model`: self-attention and cross-attention.

    These are the innermost modules whose class is called an attention: in BERT
    `attention.self`, which computes it, and not `attention`, which adds the residual.
    """
    names = [name for name, part in model.named_modules() if "Attention" in type(part).__name__]
    innermost = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    return [name.removesuffix(_WRAPPED) for name in innermost]


def why_no_prefix(config: Any) -> str | None:
    """Return why no prefix can be put into the attention of a model of `config`, or None."""
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
