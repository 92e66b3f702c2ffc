"""Prefix tuning: builds `PrefixKvConfig` for a tuner of ftlevel.

PEFT's prefix tuning uses the key-value cache, which classification heads, encoders and gradient
checkpointing lack. The submodules import peft and are imported only when needed.
"""

from __future__ import annotations

from typing import Any

from ftlevel.config.methods.other import PrefixSpec
from ftlevel.methods.base import VIRTUAL_TOKEN_STEP, VIRTUAL_TOKENS, Base, MergeInfo, Method
from ftlevel.methods.rates import Rates
from ftlevel.methods.support_table import Rule, rows, single_row

_WRAPPED = ".base_layer"


def get_attention_modules(model: Any) -> list[str]:
    """Returns the full names of all self- and cross-attention modules of `model`.

    These are the innermost modules with an attention class name, such as BERT's `attention.self`.
    """
    names = [name for name, part in model.named_modules() if "Attention" in type(part).__name__]
    inner_names = [
        name for name in names if not any(other.startswith(f"{name}.") for other in names)
    ]
    return [name.removesuffix(_WRAPPED) for name in inner_names]


def get_prefix_error(config: Any) -> str | None:
    """Returns why a model with `config` does not support prefixes, or None."""
    from transformers import MODEL_MAPPING

    from ftlevel.methods.prefix.model import CUSTOM_ATTENTION
    from ftlevel.models.upstream.architectures import supports_sdpa, uses_attention_interface

    name = config.model_type
    if type(config) not in MODEL_MAPPING:
        return f"{name} is not a model of transformers, and how it computes attention is not known"
    architecture = MODEL_MAPPING[type(config)]
    if isinstance(architecture, (list, tuple)):
        architecture = architecture[0]
    module = architecture.__module__
    if any(name_of_class.startswith(f"{module}.") for name_of_class in CUSTOM_ATTENTION):
        return None
    if not uses_attention_interface(architecture):
        return (
            f"{name} computes attention without transformers' AttentionInterface, so a prefix "
            f"cannot be added"
        )
    if not supports_sdpa(architecture):
        return (
            f"the attention of {name} is more than scaled_dot_product_attention, which a prefix "
            f"needs"
        )
    if getattr(config.get_text_config(), "kv_lora_rank", None):
        return f"{name} has keys and values of unequal width (latent attention)"
    return None


ENCODER_WIDTH = 512  # Li & Liang, 2021, § 4.3

PAGE = """\
Prefix keys have no position. AdapterHub's flat prefixes with the same values give the same logits,
except in T5 and mT5, where AdapterHub numbers the prefix as the first positions."""


class PrefixTuning(Method):
    """Prefix tuning, with a tuner that prepends learned keys and values in every attention."""

    info = single_row(
        "prefix",
        "keys and values in every attention",
        "",
        "Li and Liang, 2021, arXiv:2101.00190",
        5_242_880,
    )
    rules = (
        Rule(
            rows("prefix"),
            "it computes attention without transformers' AttentionInterface",
            "Use --method prompt, or --method lora.",
            families=frozenset({"bloom", "mpnet"}),
        ),
        Rule(
            rows("prefix"),
            "its attention is more than scaled_dot_product_attention, which a prefix needs",
            "Use --method prompt, or --method lora.",
            families=frozenset({"gemma2"}),
        ),
    )
    tuner = "ftlevel.methods.prefix.model"
    step = VIRTUAL_TOKEN_STEP
    merge_info = MergeInfo(
        ("PREFIX_KV", "PREFIX_TUNING"), into_weights=False, get_error=lambda _: VIRTUAL_TOKENS
    )
    page = PAGE

    def rates(self, spec: PrefixSpec) -> Rates:
        """Returns P-tuning v2's learning rates, or lower ones if an MLP computes the prefix.

        At rates from 3e-3 (one or two targets per row) or 1e-2 (many), the MLP's tanh saturates.
        """
        if spec.prefix_projection:
            return Rates(
                small=5e-4,
                large=1e-4,
                source="not measured",
                tokens=3e-3,
                by_architecture={"decoder": 1e-3, "encoder-decoder": 3e-3},
            )
        return Rates(
            small=5e-2, large=1e-2, source="P-tuning v2", by_architecture={"encoder-decoder": 1e-1}
        )

    def format_spec(self, spec: PrefixSpec) -> str:
        """Returns length and projection of the prefix as text."""
        width = spec.encoder_hidden_size or ENCODER_WIDTH
        projection = f", by an MLP of width {width}" if spec.prefix_projection else ""
        return f"{spec.num_virtual_tokens} keys and values in front of every attention{projection}"

    def get_error(self, spec: PrefixSpec, config: Any, *_: str) -> str | None:
        """Returns why the model does not support prefixes and which methods to use, or None."""
        message = get_prefix_error(config)
        return f"{message}. Use --method prompt, or --method lora." if message else None

    def default_target_modules(self, spec: PrefixSpec, model: Any) -> list[str]:
        """Returns the full names of the attention modules of `model`, sorted."""
        return sorted(get_attention_modules(model))

    def build(self, spec: PrefixSpec, base: Base) -> Any:
        """Returns the `PrefixKvConfig` for `spec` and the attention modules of `base`."""
        from ftlevel.methods.prefix.model import PrefixKvConfig

        return PrefixKvConfig(
            **base.shared,
            num_virtual_tokens=spec.num_virtual_tokens,
            prefix_projection=spec.prefix_projection,
            encoder_hidden_size=spec.encoder_hidden_size or ENCODER_WIDTH,
        )

    def finish(self, model: Any) -> None:
        """Replace the MLP of the trained prefix in `model` (modified) by its output."""
        model.base_model.fold(model.active_adapter)


METHODS = {"prefix": PrefixTuning()}
