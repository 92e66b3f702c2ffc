"""Families that no table of ftlevel names: done right, or refused in a line, and never in part."""

from __future__ import annotations

from pathlib import Path
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
from ftlevel.models.targets import resolve_targets
from ftlevel.models.upstream.architectures import attention_of
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.method import resolve_method_targets
from unit.fast.test_step import OBJECTIVES, assert_same_step, both, rows_of

VOCAB = tiny_models.VOCAB
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **_DECODER,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "mamba": {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "recurrent_gemma": {
        **_DECODER,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "lru_width": 64,
        "attention_window_size": 128,
        "logits_soft_cap": 0.5,
    },
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **CONFIGS[family])
    return AutoModelForCausalLM.from_config(config).eval()


def adapt(model: Any, **fields: Any) -> Any:
    spec = SPECS["lora"](r=4, **fields)
    found = resolve_method_targets(spec, model, "tiny")
    return apply_method(
        model, spec, Base(model.config, "decoder", "CAUSAL_LM", found.modules, [], False, 10)
    )


def test_a_head_that_its_config_does_not_tell_is_computed_the_plain_way() -> None:
    rows, objective = rows_of("causal"), OBJECTIVES["causal"]
    model = build("recurrent_gemma")  # caps its scores by another name than Gemma 2
    fast = FastStep(model, FastPlan(True, False, True, 100, False))
    assert "its logits are changed beyond what its config describes" in fast.check_cross_entropy(
        objective, rows, 0, "cpu", "float32"
    )
    assert fast.cross_entropy is None
    assert not fast.plan.chunked_cross_entropy
    fast.remove()


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", "causal"), ("gemma3_text", "causal"), ("bert", "mlm"), ("bart", "seq2seq")],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_that_are_known_are_kept(family: str, head: str, dtype: str) -> None:
    model = tiny_models.build(family, head)
    fast = FastStep(model, FastPlan(True, False, True, 100, False))
    assert fast.check_cross_entropy(OBJECTIVES[head], rows_of(head), 0, "cpu", dtype) == ""
    assert fast.cross_entropy is not None
    fast.remove()


def test_a_recurrence_is_not_packed() -> None:
    plan = plan_fast(
        TrainConfig(), build("recurrent_gemma"), "decoder", OBJECTIVES["causal"], "cpu",
        rows_of("causal"), 64,
    )  # fmt: skip
    assert not plan.packs
    assert "carries a state" in str(plan.choices[0])


def test_linears_that_a_scan_reads_are_left_out() -> None:
    model = build("mamba")
    names = {name.rpartition(".")[2] for name in resolve_targets(model, "all-linear")}
    assert names == {"in_proj", "x_proj"}
    for wish in ("out_proj", ".*out_proj", "dt_proj"):
        with pytest.raises(ConfigError, match="would have no effect"):
            resolve_targets(model, wish)


def test_an_adapter_on_other_modules_than_asked_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="gate_proj, up_proj for the experts") as refused:
        adapt(build("deepseek_v3"))
    names = str(refused.value).rpartition("--target-modules ")[2].rstrip(".")
    adapted = adapt(build("deepseek_v3"), target_modules=names.split(","))
    assert len(adapted.base_model.targeted_module_names) == 10


def test_values_of_another_width_than_the_keys() -> None:
    rows, objective = rows_of("causal"), OBJECTIVES["causal"]
    model = build("deepseek_v3")
    fast = FastStep(model, FastPlan(True, True, False, 100, False))
    assert fast.check(rows, 0, "cpu", "float32") == []
    fast.remove()
    assert objective.headline


def test_two_base_classes_of_one_name() -> None:
    config = AutoConfig.for_model("funnel", vocab_size=VOCAB)
    assert rename_prefix(config, "AutoModelForSequenceClassification") == {}


def test_a_fused_output_may_be_scaled_in_place() -> None:
    """Longformer, LED and DeBERTa divide their queries where they stand."""
    x = torch.randn(2, 3, 8, requires_grad=True)
    a = torch.randn(4, 8, requires_grad=True)
    b = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(6, 8)
    y = FusedLoraFunction.apply(x, None, a, b, None, lambda: weight, 2.0)
    scaled = y.transpose(0, 1)
    scaled /= 3.0
    found = torch.autograd.grad(scaled.square().sum(), (x, a, b))
    expected = (functional.linear(x, weight) + 2.0 * x @ a.T @ b.T) / 3.0
    wanted = torch.autograd.grad(expected.square().sum(), (x, a, b))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("family", "more", "aside"),
    [
        ("longformer", {"attention_window": [8, 8]}, {"query_global", "key_global"}),
        ("luke", {"entity_vocab_size": 9}, {"w2e_query", "e2w_query", "e2e_query"}),
    ],
)
def test_linears_that_a_task_does_not_use_are_left_out(
    family: str, more: dict[str, Any], aside: set[str]
) -> None:
    config = AutoConfig.for_model(family, **{**_DECODER, **more})
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    names = {name.rpartition(".")[2] for name in resolve_targets(model, "all-linear")}
    assert "query" in names
    assert not names & aside
    assert len(resolve_targets(model, sorted(aside)[0])) == 2  # who names them gets them


@pytest.mark.parametrize("family", ["mamba", "rwkv", "switch_transformers"])
def test_linears_that_cannot_be_packed_stay_as_they_are(family: str) -> None:
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "hidden_size": 64, "d_model": 64,
             "num_layers": 2, "num_decoder_layers": 2}  # fmt: skip
    kind = "Seq2SeqLM" if family == "switch_transformers" else "CausalLM"
    config = AutoConfig.for_model(family, **sizes)
    quantization = build_quantization_config(QuantConfig(kind="4bit"), torch.float32, [])
    kept = keep_heads(quantization, config, f"AutoModelFor{kind}").llm_int8_skip_modules
    ends = {"mamba": "dt_proj", "rwkv": "feed_forward.value", "switch_transformers": "wo"}
    assert any(name.endswith(f".{ends[family]}") for name in kept)


def test_deberta_computes_in_float32() -> None:
    assert select_dtype("auto", "cpu", "lora", "deberta").value == "float32"
    with pytest.raises(ConfigError, match="--dtype bfloat16 cannot be used with deberta"):
        select_dtype("bfloat16", "cpu", "lora", "deberta")


@pytest.mark.parametrize("lengths", [(5, 30, 12, 12, 3, 21, 8, 17), (90, 150, 300)])
def test_capped_scores_are_packed_and_are_those_of_the_models_own_attention(
    lengths: tuple[int, ...], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(
        "gemma2", **{**_DECODER, "num_key_value_heads": 2}, head_dim=16, sliding_window=8,
        attn_logit_softcapping=0.5, query_pre_attn_scalar=16, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # scores that the cap bends
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    assert attention_of(model) == "eager"
    rows, objective = rows_of("causal", lengths), OBJECTIVES["causal"]
    plan = plan_fast(TrainConfig(), model, "decoder", objective, "cpu", rows, 300)
    assert plan.packs
    assert attention_of(model) == "eager"
    assert_same_step(both(model, "causal", tmp_path, rows=rows, at_least=1), 1e-4)
    ids = torch.tensor(rows[1].input_ids)[None]
    model.eval()
    alone, written = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    fast = FastStep(model, plan)
    assert fast.check(rows, 0, "cpu", "float32") == []
    torch.testing.assert_close(model(ids).logits, alone, rtol=1e-4, atol=1e-4)  # not packed
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)
    fast.remove()
    assert attention_of(model) == "eager"
