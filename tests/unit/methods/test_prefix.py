"""Tests of the attention of prefix tuning against references."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ftlevel.config.methods.other import PrefixSpec
from ftlevel.methods import METHODS
from ftlevel.methods.prefix import get_attention_modules
from ftlevel.methods.prefix import model as attention
from tiny_models import (
    FAMILIES,
    HEADS,
    build,
    build_batch,
    build_config,
    compute_logits,
)
from virtual_tokens import adapt

PLAIN = PrefixSpec(num_virtual_tokens=4)
PROJECTED = PrefixSpec(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16)


def test_encoder_decoder_has_prefix_in_self_and_cross_attention():
    model = adapt(PLAIN, "t5", "seq2seq")
    names = {
        n.rpartition(".prefix_kv_")[0] for n, _ in model.named_parameters() if "prefix_kv_" in n
    }
    expected = {"encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.0.SelfAttention",
                "decoder.block.0.layer.1.EncDecAttention"}  # fmt: skip
    assert expected <= {name.removeprefix("base_model.model.") for name in names}
    assert len(names) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_trainable_parameter_count(family):
    model = adapt(PLAIN, family, HEADS[family][0])
    config = build_config(family)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention_count = len(get_attention_modules(build(family)))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 2 * 4 * heads * width * attention_count


def test_get_attention_modules_finds_attention_names():
    names = {family: {n.rpartition(".")[2] for n in get_attention_modules(build(family))}
             for family in ("bert", "gpt_neo", "bart", "albert")}  # fmt: skip
    assert names == {"bert": {"self"}, "gpt_neo": {"attention"},
                     "bart": {"self_attn", "encoder_attn"}, "albert": {"attention"}}  # fmt: skip


def _reference_attention(query, key, value, prefix, bias, scaling):
    """softmax([q Kₚᵀ, q Kᵀ] · scale + [0, bias]) [Vₚ; V], with key heads repeated."""
    groups = query.shape[1] // key.shape[1]
    key, value = (
        torch.cat([own.expand(len(query), -1, -1, -1), states], 2).repeat_interleave(groups, 1)
        for own, states in zip(prefix, (key, value), strict=True)
    )
    scores = query @ key.mT * scaling
    scores[..., prefix[0].shape[2] :] += bias
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["causal", "all", "bool", "float", "t5", "t5 causal"])
def test_prefix_attention_matches_formula(kind, groups, queries):
    batch, heads, keys, width = 2, 4, 5, 8
    query = torch.randn(batch, heads, queries, width)
    key, value = (torch.randn(batch, heads // groups, keys, width) for _ in range(2))
    prefix = tuple(torch.randn(1, heads // groups, 3, width) for _ in range(2))
    is_causal = kind in ("causal", "t5 causal")
    visible = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if kind not in ("all", "t5"):
        visible = visible.tril(keys - queries)
    if kind in ("bool", "float"):
        visible[0, :, :, 0] = False  # padding
    position_bias = torch.randn(1, heads, queries, keys) if kind.startswith("t5") else None
    mask = {"bool": visible, "float": torch.where(visible, 0.0, torch.finfo().min)}.get(kind)
    bias = torch.where(visible, 0.0, -torch.inf) + (0 if position_bias is None else position_bias)
    module = SimpleNamespace(is_causal=is_causal, num_key_value_groups=groups)
    output, _ = attention.prefix_attention_forward(
        module, query, key, value, mask, prefix=prefix, position_bias=position_bias, scaling=0.3
    )
    torch.testing.assert_close(output, _reference_attention(query, key, value, prefix, bias, 0.3))


@pytest.mark.parametrize("family", ["gpt_neo", "deberta-v2"])
def test_empty_prefix_matches_base_logits(family):
    """With an empty prefix: detects a change of the attention in transformers."""
    base, inputs = build(family), build_batch(family)
    model = adapt(PLAIN, family, HEADS[family][0])
    for layer in model.base_model.layers():
        for states in (layer.prefix_kv_keys, layer.prefix_kv_values):
            states["default"] = nn.Parameter(states["default"][:0])
    torch.testing.assert_close(compute_logits(model, inputs), compute_logits(base, inputs))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_match_peft_prefix_tuning_with_same_vectors(family):
    from peft import PrefixTuningConfig, get_peft_model

    model = adapt(PLAIN, family, "causal")
    reference = get_peft_model(
        build(family), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    vectors = [p for layer in model.base_model.layers() for p in layer.compute("default")]
    reference.prompt_encoder["default"].embedding.weight.data = torch.cat(vectors, dim=1).detach()
    inputs = build_batch(family)
    # PEFT's positions of the text start after the prefix, which is part of its sequence.
    positions = torch.arange(inputs["input_ids"].shape[1])[None] + 4
    torch.testing.assert_close(
        compute_logits(model, {**inputs, "position_ids": positions}),
        compute_logits(reference, inputs),
    )


def test_prefix_is_visible_beyond_sliding_window():
    inputs = build_batch("mistral", length=12)
    base = build("mistral", sliding_window=4)
    with torch.no_grad():
        for block in base.model.layers:
            block.self_attn.v_proj.weight.zero_()  # so that only the prefix changes outputs
    model = adapt(PLAIN, "mistral", "causal", base)
    model.base_model.layers()[0].prefix_kv_values["default"].data += 1.0
    with model.disable_adapter():
        plain = compute_logits(model, inputs)
    change = (compute_logits(model, inputs) - plain).abs().amax(-1)
    assert (change > 1e-4).all()


def test_projection_mlp_is_shared_and_removed_by_finish():
    model = adapt(PROJECTED, "llama", "causal")
    shared = [n for n, _ in model.named_parameters() if "embedding" in n and "prefix_kv" in n]
    assert len(shared) == 1
    METHODS["prefix"].finish(model)
    names = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"prefix_kv_keys", "prefix_kv_values"}
    assert model.peft_config["default"].prefix_projection is False


def test_projected_prefix_matches_formula():
    model = adapt(PROJECTED, "llama", "causal")
    layers = [m for m in model.modules() if isinstance(m, attention.PrefixLayer)]
    first = layers[0]
    embedding, hidden = first.prefix_kv_embedding["default"], first.prefix_kv_hidden["default"]
    states = torch.tanh(embedding @ hidden.weight.T + hidden.bias)
    for layer in layers:
        output = layer.prefix_kv_output["default"]
        expected = states @ output.weight.T + output.bias
        torch.testing.assert_close(torch.cat(layer.compute("default"), 1), expected)


def test_projected_prefix_has_lower_learning_rate():
    projected, plain = map(METHODS["prefix"].rates, (PROJECTED, PLAIN))
    assert projected.small < plain.small
    assert projected.large < plain.large == 1e-2


def test_merge_raises():
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        adapt(PLAIN, "llama", "causal").merge_and_unload()


def test_unsupported_attn_implementation_raises():
    model = build("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention"):
        adapt(PLAIN, "llama", "causal", model)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "computes attention without"),
        ("gemma2", "more than scaled_dot_product"),
        ("deepseek_v3", "unequal width"),
        ("gpt_oss", "more than scaled_dot_product"),
    ],
)
def test_unsupported_family_returns_error(model_type, reason):
    from transformers import AutoConfig

    error = METHODS["prefix"].get_error(
        PLAIN, AutoConfig.for_model(model_type), "decoder", "", "none"
    )
    assert reason in error
    assert "Use --method" in error
