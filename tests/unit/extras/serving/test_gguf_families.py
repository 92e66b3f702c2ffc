"""Tests of the limits of llama.cpp and of weight conversions for it."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ftlevel.extras.serving.gguf_families import (
    FAMILIES,
    build_metadata,
    context_limit,
    convert,
    extra_tensors,
    get_gguf_limitations,
    interleave,
)
from tiny_models import build_config

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 128}  # fmt: skip
GEMMA = {"num_hidden_layers": 6, "layer_types": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_default_model_of_family_has_no_limitations(family):
    overrides = GEMMA if family == "gemma3_text" else {}
    assert get_gguf_limitations(build_config(family, **overrides)) == []


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("gpt_neo", {}, "gpt_neo is not among the families"),
        ("mixtral", {}, "mixtral is not among the families"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"rope_parameters": YARN}, "of the kind yarn"),
        ("qwen2", {"rope_parameters": LLAMA_3}, "of the kind llama3"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("gpt2", {"activation_function": "relu"}, "its activation is relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gemma3_text", {}, "do not alternate five"),
        ("gemma3_text", {**GEMMA, "query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8"),
        ("gemma3_text", {**GEMMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50"),
    ],
)
def test_unsupported_config_is_reported(family, overrides, message):
    problems = get_gguf_limitations(build_config(family, **overrides))
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(("heads", "shape"), [(4, (64, 48)), (2, (32, 48)), (4, (64,))])
def test_interleave_is_inverse_of_transformers_permutation(heads, shape):
    weight = torch.randn(shape)
    interleaved = interleave(weight, heads)
    assert not torch.equal(interleaved, weight)
    restored = LlamaTensorProcessor()._reverse_permute_weights(interleaved.numpy(), heads)
    assert torch.equal(torch.from_numpy(restored.copy()), weight)


def test_gemma_norm_weights_are_increased_by_one():
    config = build_config("gemma3_text", **GEMMA)
    weight = torch.tensor([0.5, -0.25], dtype=torch.bfloat16)
    converted = convert(config, "blk.0.attn_q_norm.weight", weight, is_conv1d=False)
    assert converted.tolist() == [1.5, 0.75]
    converted = convert(config, "blk.0.attn_q.weight", weight, is_conv1d=False)
    assert torch.equal(converted, weight)


def test_rope_divisors_give_scaled_frequencies():
    config = build_config("llama", rope_parameters=LLAMA_3)
    divisors = extra_tensors(config)["rope_freqs.weight"]
    plain = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    stretched = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    torch.testing.assert_close(plain / divisors, stretched)
    assert divisors.max() > 7.9
    assert divisors.min() == 1
    assert extra_tensors(build_config("llama")) == {}


def test_sliding_window_limits_stated_context():
    assert context_limit(build_config("mistral")) == (512, None)
    assert context_limit(build_config("mistral", sliding_window=128)) == (128, 128)
    assert context_limit(build_config("mistral", sliding_window=4096)) == (512, None)
    assert context_limit(build_config("qwen2", sliding_window=128)) == (512, None)
    config = build_config("gemma3_text", **GEMMA)
    assert context_limit(config) == (512, None)
    assert build_metadata(config)["gemma3.attention.sliding_window"] == 64
