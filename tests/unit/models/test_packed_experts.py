"""Tests that 4-bit experts compute like their dequantized weights at a third of the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from torch.utils._pytree import tree_leaves

import tiny_models
from ftlevel.config import QuantConfig
from ftlevel.models.loading import load_model
from ftlevel.models.quantization import build_quantization_config
from ftlevel.models.sources import ModelSource
from ftlevel.models.upstream.architectures import can_pack

FAMILIES = ("mixtral", "qwen3_moe")
ModelDir = Callable[..., Path]


def load_packed(directory: Path, family: str, dtype: torch.dtype, **quant: Any) -> Any:
    quant_config = QuantConfig(kind="4bit", experts=True, **quant)
    auto_class = tiny_models.AUTO_CLASSES["causal"]
    source = ModelSource(family, "directory", str(directory))
    config = tiny_models.transformers.AutoConfig.from_pretrained(directory)
    return load_model(
        source, config, auto_class, dtype=dtype, device="cpu",
        quantization=build_quantization_config(quant_config, dtype, []),
    )[0]  # fmt: skip


def load_plain(directory: Path, dtype: torch.dtype) -> Any:
    return tiny_models.transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def quantize_round_trip(weight: torch.Tensor, double: bool) -> torch.Tensor:
    """Return the weight after bitsandbytes' own 4-bit quantization and dequantization."""
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    return bnb.dequantize_4bit(codes, state)


def add_lora(model: Any) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_match_dequantized_loss_and_gradients(family, double, tiny_model_dir):
    directory = tiny_model_dir(family)
    packed = load_packed(directory, family, torch.float32, double_quant=double)
    plain = load_plain(directory, torch.float32)
    quantized_layers = {n for n, m in packed.named_modules() if type(m).__name__ == "Linear4bit"}
    for name, module in plain.named_modules():
        for parameter_name in [n for n in ("gate_up_proj", "down_proj") if can_pack(module)]:
            getattr(module, parameter_name).data = quantize_round_trip(
                getattr(module, parameter_name).data, double
            )
        if name in quantized_layers:
            module.weight.data = quantize_round_trip(module.weight.data, double)
    plain.set_experts_implementation("eager")  # transformers' own loop over the experts
    batch = tiny_models.build_batch(family, "causal")
    results = []
    for model in (add_lora(packed), add_lora(plain)):
        loss = model(**batch).loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((loss.detach(), gradients))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    distance = (results[0][1] - results[1][1]).norm() / results[1][1].norm()
    assert distance < 1e-5


def count_bytes(model: Any) -> int:
    """Return the bytes of the weights, including the scales of packed ones."""
    tensors: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        tensors[id(parameter)] = parameter
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors |= {id(t): t for t in (state.absmax, state.code) if t is not None}
            state = state.state2
    return sum(t.numel() * t.element_size() for t in tensors.values())


SIZES = {
    "mixtral": {"hidden_size": 128, "intermediate_size": 512, "num_local_experts": 8},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 256, "num_experts": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_use_less_memory_and_save_no_weights(family, tiny_model_dir):
    directory = tiny_model_dir(family, **SIZES[family])
    model = load_packed(directory, family, torch.bfloat16)
    assert count_bytes(model) <= 0.35 * count_bytes(load_plain(directory, torch.bfloat16))
    expert_size = min(
        module.parametrizations[name][0].quant_state.shape[1:].numel()
        for module in model.modules() if hasattr(module, "parametrizations")
        for name in module.parametrizations
    )  # fmt: skip
    saved: list[torch.Tensor] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        batch = tiny_models.build_batch(family, "causal")
        loss = add_lora(model)(**{k: v[:, :16] for k, v in batch.items()}).loss
    assert loss.grad_fn is not None
    large = [t for t in saved if t.is_floating_point() and t.numel() >= expert_size]
    vocab_size = model.config.vocab_size
    assert [t.shape for t in large if vocab_size not in t.shape] == []
    assert len(tree_leaves(saved)) > 0


def test_save_pretrained_of_packed_experts_raises(tiny_model_dir, tmp_path):
    model = load_packed(tiny_model_dir("mixtral"), "mixtral", torch.bfloat16)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)


def test_quant_facts_include_experts_only_for_4bit():
    assert "experts" not in QuantConfig(kind="4bit", experts=False).facts
    assert QuantConfig(kind="4bit", experts=True).facts["experts"] is True
    assert QuantConfig(kind="8bit").facts == {"kind": "8bit"}


def test_can_pack_rejects_unsupported_modules():
    model = tiny_models.build("mixtral")
    experts = model.model.layers[0].mlp.experts
    assert can_pack(experts)
    experts.has_bias = True
    assert not can_pack(experts)
    del experts.has_bias  # a class without transformers' experts interface
    assert not can_pack(experts)
    assert not can_pack(tiny_models.build("llama").model.layers[0].mlp)
