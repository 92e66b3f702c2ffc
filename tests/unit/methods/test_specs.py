"""Tests of the PEFT config of each method spec, and of its validation errors."""

from __future__ import annotations

import time
from typing import Any

import pytest

from ftlevel.config import SPECS, build_config, parse_overrides
from ftlevel.errors import ConfigError, FtlevelError
from ftlevel.methods import METHODS, Base, Method, lora
from ftlevel.models import targets as model_targets
from ftlevel.models.module_tree import get_heads
from ftlevel.training.plan.method import resolve_method_targets
from unit.models.meta_models import build, has_model
from unit.models.tiny_configs import TINY

BASE = Base(None, "encoder", "SEQ_CLS", ["query", "0.output.dense"], ["classifier"], False, 100)


def build_peft_config(kind: str, base: Base = BASE, **fields: Any) -> Any:
    return METHODS[kind].build(SPECS[kind](**fields), base)


ADAPTER_KINDS = [kind for kind, m in METHODS.items() if m.is_adapter and not m.tuner]


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_config_has_heads_task_type_and_targets(kind):
    config = build_peft_config(kind)
    assert list(config.modules_to_save) == ["classifier"]
    assert config.task_type == "SEQ_CLS"
    assert set(config.target_modules) == {"query", "0.output.dense"}


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("lora", {}, {"r": 8, "lora_alpha": 16, "init_lora_weights": True, "bias": "none"}),
        ("lora", {"init_lora_weights": "pissa", "use_rslora": True},
         {"init_lora_weights": "pissa", "use_rslora": True}),
        ("lora", {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 4.0}},
         {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 4}}),
        ("adalora", {}, {"init_r": 12, "target_r": 8, "tinit": 10, "tfinal": 30, "total_step": 100,
                         "deltaT": 1, "orth_reg_weight": 0.5}),
        ("adalora", {"tinit": 3, "tfinal": 0, "delta_t": 5},
         {"tinit": 3, "tfinal": 0, "deltaT": 5}),
        ("ia3", {}, {"feedforward_modules": {"0.output.dense"}}),
        ("vera", {}, {"r": 256, "d_initial": 0.1, "save_projection": True}),
        ("oft", {}, {"r": 0, "oft_block_size": 32, "use_cayley_neumann": True}),
        ("boft", {}, {"boft_block_size": 4, "boft_n_butterfly_factor": 1}),
        ("loha", {"r": 2}, {"r": 2, "alpha": 8}),
        ("lokr", {"decompose_factor": 4}, {"decompose_factor": 4}),
        ("miss", {"miss_dropout": 0.1}, {"r": 64, "miss_dropout": 0.1, "init_weights": True}),
        ("shira", {"random_seed": 3}, {"r": 32, "mask_type": "random", "random_seed": 3}),
        ("hira", {"hira_dropout": 0.1}, {"r": 32, "hira_dropout": 0.1, "init_weights": True}),
        ("gralora", {"gralora_k": 4},
         {"r": 32, "alpha": 64, "gralora_k": 4, "hybrid_r": 0, "gralora_dropout": 0.0}),
        ("c3a", {"block_size": 8}, {"block_size": 8, "init_weights": True}),
    ],
)  # fmt: skip
def test_config_fields_of_each_method(kind, fields, expected):
    config = build_peft_config(kind, **fields)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method.init_lora_weights=corda"],
         "--set method.init_lora_weights: 'corda': it needs statistics of the activations, which "
         "ftlevel does not collect. Use pissa on a float base, or default on a quantized one."),
        (["method.init_lora_weights=loftq", "method.use_dora=true"],
         "--dora cannot be used with --init loftq: DoRA takes its magnitudes "
         "from the weights before that start is set. Drop one of them."),
        (["method.kind=gralora", "method.gralora_k=3"],
         "method.gralora_k 3 does not divide method.r 32, which its blocks share. Set "
         "method.r to a multiple of 3."),
        (["method.target_parameters=experts", "method.lora_dropout=0.1"],
         "--target-parameters experts cannot be used with --lora-dropout 0.1: PEFT's LoRA of a "
         "bare tensor does not have it. Drop one of them."),
        (["method=adalora", "method.target_r=12"],
         "--set method: method.target_r 12 is not below init_r 12, and AdaLoRA only lowers ranks. "
         "Raise init_r, lower target_r, or use --method lora."),
        (["method.lora_plus_ratio=0.5"],
         "--set method.lora_plus_ratio: 0.5 is out of range: "
         "method.lora_plus_ratio must be ≥ 1.0."),
    ],
)  # fmt: skip
def test_invalid_fields_raise(settings, message):
    with pytest.raises(ConfigError) as caught:
        build_config([parse_overrides(settings)])
    assert str(caught.value) == message


def test_adalora_with_too_few_steps_raises():
    base = Base(None, "decoder", "CAUSAL_LM", ["q_proj"], [], False, 1)
    with pytest.raises(ConfigError) as caught:
        build_peft_config("adalora", base)
    assert str(caught.value) == (
        "method.tinit 0 and method.tfinal 0 leave fewer than 2 of the run's 1 steps to prune ranks "
        "in. Train longer, or lower them."
    )


def resolve_tiny_targets(
    family: str, kind: str, task: str = "", variant: int = 0, **fields: Any
) -> Any:
    task = task or ("text-generation" if has_model(family, "text-generation") else "masked-lm")
    return resolve_method_targets(SPECS[kind](**fields), build(family, task, variant), family)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("oft", {"oft_block_size": 48},
         "method.oft_block_size 48 does not divide the inputs of 14 of 14 linear layers, such as "
         "model.layers.0.mlp.down_proj (160 wide). "
         "Set method.oft_block_size to one of 2, 4, 8, 16, 32."),
        ("boft", {"boft_block_size": 5},
         "method.boft_block_size 5 does not divide the inputs of 12 of 14 linear layers, such as "
         "model.layers.0.mlp.gate_proj (64 wide). "
         "Set method.boft_block_size to one of 2, 4, 8, 16, 32."),
        ("miss", {"r": 100},
         "method.r 100 is more than the inputs of 12 of 14 linear layers, such as "
         "model.layers.0.mlp.gate_proj (64 wide). Set method.r to 64 or less."),
        ("shira", {},
         "method.r 32 is larger than 4 of 14 linear layers allow, such as "
         "model.layers.0.self_attn.k_proj. Set method.r to 21 or less."),
        ("gralora", {"r": 9, "gralora_k": 3},
         "method.gralora_k 3 does not divide the inputs or outputs of 14 of 14 linear layers, "
         "such as model.layers.0.mlp.down_proj (64 wide). "
         "Set method.gralora_k to one of 2, 4, 8, 16, 32."),
        ("c3a", {},
         "method.block_size 64 does not divide the inputs or outputs of 10 of 14 linear layers, "
         "such as model.layers.0.mlp.down_proj (160 wide). "
         "Set method.block_size to one of 2, 4, 8, 16, 32."),
        ("lora", {"rank_pattern": {"q_porj": 4}},
         "method.rank_pattern: 'q_porj' matches none of the 14 adapted modules (down_proj, "
         "gate_proj, up_proj, k_proj, o_proj, q_proj, v_proj) and would be ignored. "
         "Expected the end of a module name, or a regular expression."),
        ("lora", {"init_lora_weights": "pissa", "r": 100},
         "--init pissa takes r directions of each layer, and r 100 is more than 14 of 14 linear "
         "layers have, such as model.layers.0.self_attn.k_proj (32). Set its rank to 32 or less, "
         "or use --init default."),
        ("lora", {"init_lora_weights": "olora", "rank_pattern": {"up_proj": 80}},
         "--init olora takes r directions of each layer, and r 80 is more than 2 of 14 linear "
         "layers have, such as model.layers.0.mlp.up_proj (64). Set its rank to 64 or less, "
         "or use --init default."),
        ("lora", {"init_lora_weights": "orthogonal", "rank_pattern": {"up_proj": 3}},
         "--init orthogonal needs even ranks, and r is 3. Set it to 4, or use --init default."),
        ("lora", {"layers_to_transform": [1, 7]},
         "method.layers_to_transform: there is no layer 7 with adapted modules. Layers here are 0 "
         "to 1."),
        ("lora", {"target_parameters": "experts"},
         "method.target_parameters: llama has no experts in one tensor. Drop it; --target-modules "
         "all-linear covers all linear layers."),
    ],
)  # fmt: skip
def test_fields_that_do_not_fit_model_raise(kind, fields, message):
    with pytest.raises(ConfigError) as caught:
        resolve_tiny_targets("llama", kind, **fields)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("module", "fields"),
    [(lora, {"rank_pattern": {r"(\w+\.?)+x": 4}}), (lora, {"alpha_pattern": {r"(\w+\.?)+x": 4}}),
     (model_targets, {"target_modules": r"(\w+\.?)+x"})],
)  # fmt: skip
def test_slow_regular_expression_times_out(monkeypatch, module, fields):
    monkeypatch.setattr(module, "_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(FtlevelError, match=r"it took more than 0\.2 s"):
        resolve_tiny_targets("llama", "lora", **fields)
    assert time.monotonic() - start < 10


def test_layers_to_transform_selects_layers():
    fields = {"layers_to_transform": [1], "target_modules": ["q_proj"]}
    modules = resolve_tiny_targets("llama", "lora", **fields).modules
    assert modules == ["model.layers.1.self_attn.q_proj"]
    modules = resolve_tiny_targets("t5", "lora", "summarization", layers_to_transform=[2]).modules
    assert {name.split(".")[0] for name in modules} == {"decoder"}  # the encoder has two layers


def test_target_parameters_experts_resolves_and_unknown_raises():
    parameters = resolve_tiny_targets("mixtral", "lora", target_parameters="experts").parameters
    assert parameters == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with pytest.raises(ConfigError, match=r"'mlp\.experts\.up' is not a tensor of mixtral"):
        resolve_tiny_targets("mixtral", "lora", target_parameters=["mlp.experts.up"])


@pytest.mark.parametrize("family", TINY)
def test_ia3_targets_keys_values_and_feed_forward(family):
    tasks = ("text-generation", "summarization", "masked-lm")
    task = next(t for t in tasks if has_model(family, t))
    for variant in range(len(TINY[family])):
        modules = resolve_tiny_targets(family, "ia3", task, variant).modules
        config = build_peft_config("ia3", Base(None, "", None, modules, [], False, 1))
        assert set(modules) - set(config.feedforward_modules), "no keys and values"
        if family not in ("mixtral", "qwen3_moe"):  # their experts are in tensors, not modules
            assert config.feedforward_modules
        heads = get_heads(build(family, task, variant))
        assert not any(name.startswith(tuple(heads)) for name in modules)


def test_ln_tuning_targets_norms_outside_heads():
    modules = resolve_tiny_targets("bert", "ln-tuning", "masked-lm").modules
    parts = [f"encoder.layer.{i}.{part}output" for i in (0, 1) for part in ("attention.", "")]
    assert modules == [f"bert.{part}.LayerNorm" for part in ("embeddings", *parts)]


def test_quantized_conv1d_has_no_fan_in_fan_out():
    spec, model = SPECS["lora"](), build("gpt2", "text-generation")
    assert resolve_method_targets(spec, model, "gpt2").fan_in_fan_out
    assert not resolve_method_targets(spec, model, "gpt2", "4bit").fan_in_fan_out


def test_method_without_build_or_unfreeze_raises():
    with pytest.raises(TypeError, match="Idle defines neither build nor unfreeze"):
        type("Idle", (Method,), {})()
