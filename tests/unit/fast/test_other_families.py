"""Tests of families that no table of ftlevel lists: handled correctly or rejected with an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import tiny_models
from ftlevel.config import SPECS, QuantConfig, TrainConfig
from ftlevel.errors import ConfigError
from ftlevel.fast.fused_lora import FusedLoraFunction
from ftlevel.fast.plan import FastPlan, plan_fast
from ftlevel.fast.step import FastStep
from ftlevel.methods import Base
from ftlevel.models.hardware import select_dtype
from ftlevel.models.loading import keep_heads, rename_prefix
from ftlevel.models.quantization import build_quantization_config
from ftlevel.models.sources import ModelSource
from ftlevel.models.targets import resolve_targets
from ftlevel.models.upstream.architectures import attention_of
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.method import resolve_method_targets
from ftlevel.weights.quantize_shards import get_modules_to_skip
from unit.fast.test_step import OBJECTIVES, assert_same_step, compute_both_steps, create_rows

VOCAB = tiny_models.VOCAB
_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 128, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **_DECODER, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    },
    "mamba": {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "recurrent_gemma": {
        **_DECODER, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 64,
        "attention_window_size": 128, "logits_soft_cap": 0.5,
    },
}  # fmt: skip


def build(family: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **CONFIGS.get(family, _DECODER), **fields)
    return AutoModelForCausalLM.from_config(config).eval()


def adapt(model: Any, **fields: Any) -> Any:
    spec = SPECS["lora"](r=4, **fields)
    targets = resolve_method_targets(spec, model, "tiny")
    return apply_method(
        model, spec, Base(model.config, "decoder", "CAUSAL_LM", targets.modules, [], False, 10)
    )


def test_unknown_logit_change_disables_chunked_cross_entropy():
    # the soft cap of recurrent_gemma has another name than Gemma 2's
    fast = FastStep(build("recurrent_gemma"), FastPlan(True, False, True, 100, False))
    rows, objective = create_rows("causal"), OBJECTIVES["causal"]
    reason = fast.check_cross_entropy(objective, rows, 0, "cpu", "float32")
    assert "its logits are changed beyond what its config describes" in reason
    assert fast.cross_entropy is None
    assert not fast.plan.chunked_cross_entropy
    fast.remove()


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", "causal"), ("gemma3_text", "causal"), ("bert", "mlm"), ("bart", "seq2seq")],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunked_cross_entropy_is_enabled_for_known_heads(family, head, dtype):
    model = tiny_models.build(family, head)
    fast = FastStep(model, FastPlan(True, False, True, 100, False))
    assert fast.check_cross_entropy(OBJECTIVES[head], create_rows(head), 0, "cpu", dtype) == ""
    assert fast.cross_entropy is not None
    fast.remove()


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [("recurrent_gemma", {}, "carries a state"),
     ("minimax", {"num_local_experts": 2, "head_dim": 16}, "carries a state"),  # no convolution
     ("falcon", {"alibi": True}, "adds ALiBi"),
     ("falcon", {}, "")],
)  # fmt: skip
def test_model_with_state_or_alibi_is_not_packed(family, fields, reason):
    plan = plan_fast(
        TrainConfig(), build(family, **fields), "decoder", OBJECTIVES["causal"], "cpu",
        create_rows("causal"), 64,
    )  # fmt: skip
    assert plan.packs == (not reason)
    assert reason in str(plan.choices[0])


def test_all_linear_excludes_layers_read_by_mamba_scan():
    model = build("mamba")
    names = {name.rpartition(".")[2] for name in resolve_targets(model, "all-linear")}
    assert names == {"in_proj"}
    for target_modules in ("out_proj", ".*out_proj", "dt_proj", "x_proj"):
        with pytest.raises(ConfigError, match="would have no effect"):
            resolve_targets(model, target_modules)


def test_all_linear_with_unsupported_experts_raises():
    with pytest.raises(ConfigError, match="gate_proj, up_proj for the experts") as error:
        adapt(build("deepseek_v3"))
    names = str(error.value).rpartition("--target-modules ")[2].rstrip(".")
    adapted = adapt(build("deepseek_v3"), target_modules=names.split(","))
    assert len(adapted.base_model.targeted_module_names) == 10


def test_packing_with_different_value_and_key_widths():
    fast = FastStep(build("deepseek_v3"), FastPlan(True, True, False, 100, False))
    assert fast.check(create_rows("causal"), 0, "cpu", "float32") == []
    fast.remove()


def test_rename_prefix_of_funnel_is_empty():
    config = AutoConfig.for_model("funnel", vocab_size=VOCAB)
    assert rename_prefix(config, "AutoModelForSequenceClassification") == {}


def test_fused_lora_output_can_be_scaled_in_place():
    """Longformer, LED and DeBERTa scale their queries in place."""
    x = torch.randn(2, 3, 8, requires_grad=True)
    a = torch.randn(4, 8, requires_grad=True)
    b = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(6, 8)
    y = FusedLoraFunction.apply(x, None, a, b, None, lambda: weight, 2.0)
    scaled = y.transpose(0, 1)
    scaled /= 3.0
    actual = torch.autograd.grad(scaled.square().sum(), (x, a, b))
    reference = (functional.linear(x, weight) + 2.0 * x @ a.T @ b.T) / 3.0
    expected = torch.autograd.grad(reference.square().sum(), (x, a, b))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("family", "fields", "unused"),
    [
        ("longformer", {"attention_window": [8, 8]}, {"query_global", "key_global"}),
        ("luke", {"entity_vocab_size": 9}, {"w2e_query", "e2w_query", "e2e_query"}),
    ],
)
def test_all_linear_excludes_layers_unused_by_task(family, fields, unused):
    config = AutoConfig.for_model(family, **{**_DECODER, **fields})
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    names = {name.rpartition(".")[2] for name in resolve_targets(model, "all-linear")}
    assert "query" in names
    assert not names & unused
    assert (
        len(resolve_targets(model, sorted(unused)[0])) == 2
    )  # explicit target_modules include them


@pytest.mark.parametrize("family", ["mamba", "rwkv", "switch_transformers"])
def test_incompatible_linear_layers_are_not_quantized(family, tmp_path):
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "hidden_size": 64, "d_model": 64,
             "num_layers": 2, "num_decoder_layers": 2}  # fmt: skip
    kind = "Seq2SeqLM" if family == "switch_transformers" else "CausalLM"
    config = AutoConfig.for_model(family, **sizes)
    quantization = build_quantization_config(QuantConfig(kind="4bit"), torch.float32, [])
    source = ModelSource(family, "directory", str(tmp_path))
    result = keep_heads(quantization, config, f"AutoModelFor{kind}", source)
    skipped = result.llm_int8_skip_modules
    suffixes = {"mamba": "dt_proj", "rwkv": "feed_forward.value", "switch_transformers": "wo"}
    for names in (skipped, get_modules_to_skip(config, f"AutoModelFor{kind}")):
        assert any(name.endswith(f".{suffixes[family]}") for name in names)


def test_deberta_supports_only_float32():
    assert select_dtype("auto", "cpu", "deberta").value == "float32"
    with pytest.raises(ConfigError, match="--dtype bfloat16 cannot be used with deberta"):
        select_dtype("bfloat16", "cpu", "deberta")


@pytest.mark.parametrize("lengths", [(5, 30, 12, 12, 3, 21, 8, 17), (90, 150, 300)])
def test_packed_soft_capped_attention_matches_eager(lengths, tmp_path):
    config = AutoConfig.for_model(
        "gemma2", **{**_DECODER, "num_key_value_heads": 2}, head_dim=16, sliding_window=8,
        attn_logit_softcapping=0.5, query_pre_attn_scalar=16, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # logits large enough for the soft cap
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    assert attention_of(model) == "eager"
    rows, objective = create_rows("causal", lengths), OBJECTIVES["causal"]
    plan = plan_fast(TrainConfig(), model, "decoder", objective, "cpu", rows, 300)
    assert plan.packs
    assert attention_of(model) == "eager"
    assert_same_step(compute_both_steps(model, "causal", tmp_path, rows=rows, at_least=1), 1e-4)
    ids = torch.tensor(rows[1].input_ids)[None]
    model.eval()
    logits, generated = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    fast = FastStep(model, plan)
    assert fast.check(rows, 0, "cpu", "float32") == []
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)  # not packed
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)
    fast.remove()
    assert attention_of(model) == "eager"
