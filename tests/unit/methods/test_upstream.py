"""A canary test for each fact in `methods.upstream`: it fails when PEFT's private API changes."""

from __future__ import annotations

import inspect
import pickle
from collections import OrderedDict
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ftlevel.methods import upstream
from tiny_models import build
from upstream_facts import (
    OF_METHODS,
    CanaryRegistry,
    check_fact,
    create_facts,
    get_parameters,
)

CANARIES = CanaryRegistry()


@pytest.mark.parametrize("fact", create_facts(OF_METHODS), ids=lambda fact: fact.name)
def test_upstream_fact_holds(fact):
    check_fact(fact)
    CANARIES[fact.name]()


def test_each_fact_has_canary():
    assert set(CANARIES) == {fact.name for fact in create_facts(OF_METHODS)}


def build_lora_model(**settings: Any) -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **settings)
    return peft.get_peft_model(build("llama"), config)


@CANARIES.of("PeftType")
def _() -> None:
    before = dict(peft.PeftType.__members__)
    member = upstream.add_peft_type("PREFIX_KV")
    assert upstream.add_peft_type("PREFIX_KV") is member
    assert peft.PeftType("PREFIX_KV") is peft.PeftType["PREFIX_KV"] is member
    assert member in list(peft.PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert {**before, "PREFIX_KV": member} == dict(peft.PeftType.__members__)
    with pytest.raises(
        ValueError, match="Unknown PEFT type"
    ):  # otherwise no member needs to be added
        peft.utils.register_peft_method(
            name="none_of_its", config_cls=peft.LoraConfig, model_cls=peft.LoraModel
        )


@CANARIES.of("get_pattern_key")
def _() -> None:
    name = "model.layers.10.self_attn.q_proj"
    assert upstream.pattern_of({"v_proj": 1, "q_proj": 2}, name) == "q_proj"
    assert upstream.pattern_of({"layers.1.self_attn.q_proj": 1, "proj": 2}, name) == name
    assert upstream.pattern_of({r"layers\.\d+\.self_attn\.q_proj": 1}, name).startswith("layers")


@CANARIES.of("unload_and_optionally_merge_module")
def _() -> None:
    model = build_lora_model(modules_to_save=["lm_head"], init_lora_weights=False).base_model.model
    layer = model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    merged = upstream.merge_layer(layer)
    assert merged is layer.base_layer
    assert torch.equal(merged.weight, expected)
    head = model.lm_head
    assert not isinstance(head, BaseTunerLayer)
    assert upstream.merge_layer(head) is head.modules_to_save["default"]
    expected_parameters = ["self", "merge", "safe_merge", "adapter_names"]
    compound = lora.layer.MultiheadAttention.unload_and_optionally_merge_module
    assert get_parameters(compound) == expected_parameters


@CANARIES.of("random_mask", "ShiraLayer.shira_indices")
def _() -> None:
    config = peft.ShiraConfig(r=4, target_modules=["q_proj"])
    model = peft.get_peft_model(build("llama"), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    indices = upstream.shira_indices(layer)["default"]
    assert indices.shape == (2, layer.shira_weight["default"].numel())
    assert not any("indices" in name for name, _ in [*layer.named_buffers()])
    saved = peft.get_peft_model_state_dict(model)
    assert any(tensor is indices for tensor in saved.values())
    with pytest.raises(NotImplementedError, match="meta"):  # otherwise no own mask is needed
        peft.get_peft_model(build("llama").to("meta"), config, low_cpu_mem_usage=True)


@CANARIES.of("GraloraLayer.get_base_layer", "C3ALayer.get_base_layer")
def _() -> None:
    configs = (peft.GraloraConfig(target_modules=["proj"]),
               peft.C3AConfig(block_size=8, target_modules=["proj"]))  # fmt: skip
    for config in configs:
        linear = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu")
        linear.support_avx512bf16_for_cpu = False
        model = peft.get_peft_model(nn.Sequential(OrderedDict(proj=linear)), config)
        inputs = torch.randn(1, 3, 64, requires_grad=True)
        with pytest.raises(RuntimeError, match="modified inplace"):  # otherwise no copy is needed
            model(inputs)
        upstream.copy_base_outputs(model)
        model(inputs).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@CANARIES.of(
    "AdaLoraLayer.ranknum",
    "RankAllocator.ipt",
    "RankAllocator.exp_avg_ipt",
    "RankAllocator.exp_avg_unc",
)
def _() -> None:
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=0, tfinal=1, deltaT=1, total_step=5, target_modules=["q_proj"]
    )
    model = peft.get_peft_model(build("llama"), config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert float(layer.ranknum["default"]) == 6.0
    assert not any("ranknum" in name for name in peft.get_peft_model_state_dict(model))
    upstream.reset_ranks(model, peft.AdaLoraConfig(init_r=3, total_step=5))
    assert float(layer.ranknum["default"]) == 3.0
    ids = torch.arange(3, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert not any(upstream.importance_scores(model).values())
    model.base_model.update_and_allocate(1)
    scores = upstream.importance_scores(model)
    named_parameters = model.base_model.model.named_parameters()
    trained = {name for name, p in named_parameters if ".lora_" in name and p.requires_grad}
    assert [set(by_name) for by_name in scores.values()] == [trained] * 3
    for by_name in scores.values():  # PEFT uses the values that were set
        by_name.update({name: torch.zeros_like(value) for name, value in by_name.items()})
    assert not any(value.any() for value in model.base_model.rankallocator.ipt.values())


@CANARIES.of("LoraConfig._register_custom_module")
def _() -> None:
    calls = []

    def decline(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        calls.append((type(target), adapter_name, sorted(kwargs)))

    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    upstream.register_lora_layers(config, {nn.Linear: decline})
    model = peft.get_peft_model(build("llama"), config)
    assert calls[0][:2] == (nn.Linear, "default")
    assert {"loaded_in_4bit", "loaded_in_8bit", "parameter_name"} <= set(calls[0][2])
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is lora.Linear
    assert "_custom_modules" not in config.to_dict()


@CANARIES.of("Linear._hf_tp_plan")
def _() -> None:
    linear: Any = nn.Linear(2, 2)
    assert not upstream.is_sharded_linear(linear)
    linear._hf_tp_plan = "colwise"
    assert upstream.is_sharded_linear(linear)
    source = inspect.getsource(lora.layer.LoraLayer)
    assert 'getattr(base_layer, "_hf_tp_plan", None)' in source


@CANARIES.of("LoraLayer.lora_variant", "LoraLayer.lora_bias")
def _() -> None:
    for settings, has_variant, has_bias in (
        ({}, False, False), ({"use_dora": True}, True, False), ({"lora_bias": True}, False, True),
    ):  # fmt: skip
        layer = build_lora_model(**settings).base_model.model.model.layers[0].self_attn.q_proj
        assert ("default" in layer.lora_variant) is has_variant
        assert layer.lora_bias["default"] is has_bias


@CANARIES.of("lora.Linear4bit", "lora.Linear8bitLt")
def _() -> None:
    for base_layer, layer_class in (
        (bnb.nn.Linear4bit(64, 64, bias=False), lora.Linear4bit),
        (bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False), lora.Linear8bitLt),
    ):
        layer = layer_class(
            base_layer.to("cpu"), "default", config=peft.LoraConfig(r=4), r=4, lora_alpha=8
        )
        assert isinstance(layer, lora.LoraLayer)
        assert (layer.base_layer, layer.scaling) == (base_layer, {"default": 2.0})


@CANARIES.of(
    "BaseTuner._prepare_adapter_config",
    "BaseTuner._create_and_replace",
    "BaseTuner._pre_injection_hook",
    "BaseTuner._replace_module",
    "BaseTuner._check_merge_allowed",
)
def _() -> None:
    hook = ["self", "model", "config", "adapter_name"]
    expected = {
        "_prepare_adapter_config": ["self", "peft_config", "model_config"],
        "_create_and_replace": [
            "self", "peft_config", "adapter_name", "target", "target_name", "parent",
            "current_key", "parameter_name",
        ],
        "_pre_injection_hook": hook,
        "_replace_module": ["self", "parent", "child_name", "new_module", "child"],
        "_check_merge_allowed": ["self"],
    }  # fmt: skip
    assert {name: get_parameters(getattr(BaseTuner, name)) for name in expected} == expected
    called: list[str] = []

    def recording(name: str) -> Any:
        def record(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return getattr(super(recorder, self), name)(*args, **kwargs)

        return record

    recorder = type("Recorder", (peft.LoraModel,), {name: recording(name) for name in expected})
    config = peft.LoraConfig(r=4, target_modules=["layers.0.self_attn.q_proj"])
    recorder(build("llama"), config, "default").merge_and_unload()
    assert list(dict.fromkeys(called)) == [
        "_pre_injection_hook", "_prepare_adapter_config", "_create_and_replace", "_replace_module",
        "_check_merge_allowed",
    ]  # fmt: skip
    assert called[-1] == "_replace_module"  # on unload


@CANARIES.of(
    "BaseTunerLayer._disable_adapters",
    "BaseTunerLayer._cast_input_dtype",
    "BaseTunerLayer._get_available_adapters",
)
def _() -> None:
    layer = build_lora_model().base_model.model.model.layers[0].self_attn.q_proj
    assert layer._get_available_adapters() == {"default"}
    layer._disable_adapters = True
    assert layer.disable_adapters is True
    x = torch.zeros(2, dtype=torch.bfloat16)
    assert get_parameters(BaseTunerLayer._cast_input_dtype) == ["self", "x", "dtype"]
    assert layer._cast_input_dtype(x, torch.float32).dtype == torch.float32


@CANARIES.of(
    "BaseTuner._cast_adapter_dtype", "BaseTunerLayer._move_adapter_to_device_of_base_layer"
)
def _() -> None:
    move = BaseTunerLayer._move_adapter_to_device_of_base_layer
    assert get_parameters(move) == ["self", "adapter_name", "device"]
    assert get_parameters(BaseTuner._cast_adapter_dtype) == [
        "self", "adapter_name", "autocast_adapter_dtype",
    ]  # fmt: skip
    model = build_lora_model().to(torch.bfloat16)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    model.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=False)
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    model.base_model._cast_adapter_dtype("default")
    assert layer.lora_A["default"].weight.dtype == torch.float32
    layer._move_adapter_to_device_of_base_layer("default")
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16  # ftlevel keeps float32
