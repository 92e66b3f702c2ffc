"""Map transformers models to llama.cpp's architectures: metadata keys and tensor layouts.

llama.cpp assumes a value for each setting without a GGUF key; a model with a different value is
refused. BERT is written as an embedding model only. Four tensor layouts differ from transformers:
Llama's rotary halves of queries and keys are interleaved, Gemma's norms are 1 + weight, GPT-2's
Conv1D weights are transposed, and scaled rotary frequencies are a tensor of divisors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ftlevel.models.upstream.architectures import llama3_frequencies

Metadata = dict[str, Any]
_GEMMA_PATTERN = 6  # every sixth layer has full attention


@dataclass(frozen=True)
class GgufFamily:
    """How models of a `model_type` of transformers differ from llama.cpp's architecture for them.

    `rotary` has the supported rope types; it is empty for learned positions. `interleaved` means
    that rotary pairs are adjacent, `shifted_norms` that norms are 1 + weight. `fixed` maps settings
    without a GGUF key to the value that llama.cpp assumes.
    """

    architecture: str
    activation: str = "silu"
    rotary: tuple[str, ...] = ("default", "linear")
    interleaved: bool = False
    shifted_norms: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = GgufFamily("llama", rotary=("default", "linear", "llama3"), interleaved=True)
FAMILIES: dict[str, GgufFamily] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3", fixed={"attention_bias": False}),
    "gemma3_text": GgufFamily(
        "gemma3",
        "gelu_pytorch_tanh",
        shifted_norms=True,
        fixed={
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
    ),
    "phi3": GgufFamily("phi3", rotary=("default", "longrope")),
    "gpt2": GgufFamily(
        "gpt2",
        "gelu_new",
        rotary=(),
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "bert": GgufFamily("bert", "gelu", rotary=(), fixed={"is_decoder": False}),
}


def get_gguf_limitations(config: Any) -> list[str]:
    """Returns why a model of `config` cannot be saved as GGUF, one sentence each."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return [
            f"{config.model_type} is not among the families that ftlevel writes as GGUF: "
            f"{', '.join(FAMILIES)}. llama.cpp's own converter knows more."
        ]
    result = {name: getattr(config, name, value) for name, value in family.fixed.items()}
    limitations = [
        f"{name} is {value!r}, and llama.cpp computes {family.architecture} with "
        f"{family.fixed[name]!r}."
        for name, value in result.items()
        if value != family.fixed[name]
    ]
    if (own := _activation(config)) != family.activation:
        limitations.append(
            f"its activation is {own}, and llama.cpp computes {family.architecture} with "
            f"{family.activation}."
        )
    limitations += _rotary_limitations(config, family)
    if family.architecture == "gemma3":
        limitations += _gemma_limitations(config)
    if family.architecture == "phi3" and _head_width(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        limitations.append(
            "the number of heads does not divide the hidden size, which llama.cpp's phi3 requires."
        )
    return limitations


def build_metadata(config: Any) -> Metadata:
    """Returns the GGUF metadata of the model's architecture, such as sizes and rope settings."""
    family = FAMILIES[config.model_type]
    keys = _rotary_metadata(config, family) if family.rotary else _layer_norm_metadata(config)
    return {f"{family.architecture}.{key}": value for key, value in keys.items()}


def context_limit(config: Any) -> tuple[int, int | None]:
    """Returns the context length to write to the file, and the sliding window that shortened it.

    The window is None if it did not shorten the context. llama.cpp supports sliding windows for
    Gemma only; for other models the context is cut to the window, so that the window has no effect.
    """
    positions = config.max_position_embeddings
    if not FAMILIES[config.model_type].rotary:
        return positions, None
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True) and config.model_type != "gemma3_text"
    if used and window is not None and window < positions:
        return window, window
    return positions, None


def extra_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Returns tensor name → divisors of the rotary frequencies, (rotary width / 2,), float32."""
    if not FAMILIES[config.model_type].rotary:
        return {}
    rope = _rope(config)
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"], dtype=torch.float32)
            for name in ("long", "short")
        }
    if rope["rope_type"] != "llama3":
        return {}
    frequencies = llama3_frequencies(config)
    exponents = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float32) / (
        2 * len(frequencies)
    )
    return {"rope_freqs.weight": 1.0 / (rope["rope_theta"] ** exponents) / frequencies}


def convert(config: Any, name: str, tensor: torch.Tensor, *, is_conv1d: bool) -> torch.Tensor:
    """Returns the model's `tensor` in the layout of llama.cpp's tensor `name`."""
    family = FAMILIES[config.model_type]
    if is_conv1d:
        return tensor.T
    if family.interleaved and ".attn_q." in name:
        return interleave(tensor, config.num_attention_heads)
    if family.interleaved and ".attn_k." in name:
        return interleave(tensor, config.num_key_value_heads)
    if family.shifted_norms and name.endswith("norm.weight"):
        return tensor.float() + 1
    return tensor


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleave each head's rotary halves: rows 0, d/2, 1, d/2 + 1 and so on, for head size d."""
    pairs = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _layer_norm_metadata(config: Any) -> Metadata:
    """Returns the metadata of GPT-2 and BERT, which have layer norms and learned positions."""
    is_gpt2 = config.model_type == "gpt2"
    size, epsilon = (
        ("n_inner", "layer_norm_epsilon") if is_gpt2 else ("intermediate_size", "layer_norm_eps")
    )
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, size) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(getattr(config, epsilon)),
    }
    return keys if is_gpt2 else keys | {"attention.causal": False}


def _rotary_metadata(config: Any, family: GgufFamily) -> Metadata:
    rope, width = _rope(config), _head_width(config)
    keys = {
        "context_length": context_limit(config)[0],
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if family.architecture == "phi3":
        keys |= {"attention.sliding_window": 0} | _longrope_metadata(config, rope)
    if family.architecture == "gemma3":
        keys["attention.sliding_window"] = config.sliding_window
        local = float(config.rope_parameters["sliding_attention"]["rope_theta"])
        if local != 10_000:  # llama.cpp's default
            keys["rope.freq_base_swa"] = local
        if config.final_logit_softcapping is not None:
            keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return keys


def _longrope_metadata(config: Any, rope: Mapping[str, Any]) -> Metadata:
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", config.max_position_embeddings
    )
    keys: Metadata = {"rope.scaling.original_context_length": original}
    if rope["rope_type"] == "longrope":
        factor = config.max_position_embeddings / original
        default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        keys["rope.scaling.attn_factor"] = float(rope.get("attention_factor") or default)
    return keys


def _rope(config: Any) -> Mapping[str, Any]:
    """Returns the rope parameters of `config`, those of full attention if there are several."""
    parameters: Mapping[str, Any] = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _activation(config: Any) -> str:
    for name in ("hidden_activation", "hidden_act", "activation_function"):
        if (result := getattr(config, name, None)) is not None:
            return str(result)
    return "none"


def _rotary_limitations(config: Any, family: GgufFamily) -> Iterator[str]:
    if not family.rotary:
        return
    rope = _rope(config)
    if (kind := rope["rope_type"]) not in family.rotary:
        yield (
            f"its rotary positions are of the kind {kind}, which ftlevel does not write for "
            f"{config.model_type}: {', '.join(family.rotary)}."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and family.architecture != "phi3":
        yield "it rotates a part of each head only, and llama.cpp rotates all of it."


def _gemma_limitations(config: Any) -> Iterator[str]:
    layer_types = [
        "sliding_attention" if (index + 1) % _GEMMA_PATTERN else "full_attention"
        for index in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != layer_types:
        yield (
            "its layers do not alternate five sliding-window layers with one full layer, which "
            "llama.cpp requires."
        )
    if config.rope_parameters["sliding_attention"]["rope_type"] != "default":
        yield "its layers with a sliding window have stretched rotary positions."
    # llama.cpp scales by the head width, but by hidden size / heads in the model of 62 layers.
    width = (
        config.hidden_size // config.num_attention_heads
        if config.num_hidden_layers == 62  # 27B
        else _head_width(config)
    )
    if config.query_pre_attn_scalar != width:
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, not {width}."
