"""Experts in 4 bits compute what their dequantized weights do, and hold a third of the bytes."""

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


def load_packed(place: Path, family: str, dtype: torch.dtype, **quant: Any) -> Any:
    wish = QuantConfig(kind="4bit", experts=True, **quant)
    config = tiny_models.AUTO_CLASSES["causal"]
    source = ModelSource(family, "directory", str(place))
    loaded = tiny_models.transformers.AutoConfig.from_pretrained(place)
    return load_model(
        source, loaded, config, dtype=dtype, device="cpu",
        quantization=build_quantization_config(wish, dtype, []),
    )[0]  # fmt: skip


def load_plain(place: Path, dtype: torch.dtype) -> Any:
    return tiny_models.transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype)


def rounded(weight: torch.Tensor, double: bool) -> torch.Tensor:
    """Return the weight as bitsandbytes' own functions make it of its 4 bits."""
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    return bnb.dequantize_4bit(codes, state)


def with_lora(model: Any) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_dequantized_weights(
    family: str, double: bool, tiny_model_dir: ModelDir
) -> None:
    place = tiny_model_dir(family)
    packed = load_packed(place, family, torch.float32, double_quant=double)
    plain = load_plain(place, torch.float32)
    linears = {n for n, m in packed.named_modules() if type(m).__name__ == "Linear4bit"}
    for name, module in plain.named_modules():
        for own in [n for n in ("gate_up_proj", "down_proj") if can_pack(module)]:
            getattr(module, own).data = rounded(getattr(module, own).data, double)
        if name in linears:
            module.weight.data = rounded(module.weight.data, double)
    plain.set_experts_implementation("eager")  # transformers' own loop over the experts
    batch = tiny_models.build_batch(family, "causal")
    found = []
    for model in (with_lora(packed), with_lora(plain)):
        loss = model(**batch).loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        found.append((loss.detach(), gradients))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    apart = (found[0][1] - found[1][1]).norm() / found[1][1].norm()
    assert apart < 1e-5


def bytes_of(model: Any) -> int:
    """Return the bytes of a model's weights, with the scales of those that are packed."""
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
def test_it_is_a_third_of_the_bytes_and_autograd_holds_no_weights(
    family: str, tiny_model_dir: ModelDir
) -> None:
    place = tiny_model_dir(family, **SIZES[family])
    model = load_packed(place, family, torch.bfloat16)
    assert bytes_of(model) <= 0.35 * bytes_of(load_plain(place, torch.bfloat16))
    an_expert = min(
        module.parametrizations[name][0].quant_state.shape[1:].numel()
        for module in model.modules() if hasattr(module, "parametrizations")
        for name in module.parametrizations
    )  # fmt: skip
    held: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch = tiny_models.build_batch(family, "causal")
        loss = with_lora(model)(**{k: v[:, :16] for k, v in batch.items()}).loss
    assert loss.grad_fn is not None
    wide = [t for t in held if t.is_floating_point() and t.numel() >= an_expert]
    vocabulary = model.config.vocab_size
    assert [t.shape for t in wide if vocabulary not in t.shape] == []
    assert len(tree_leaves(held)) > 0


def test_transformers_does_not_save_what_it_could_not_read(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    model = load_packed(tiny_model_dir("mixtral"), "mixtral", torch.bfloat16)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)


def test_a_card_speaks_of_experts_only_where_they_are_packed() -> None:
    assert "experts" not in QuantConfig(kind="4bit", experts=False).facts
    assert QuantConfig(kind="4bit", experts=True).facts["experts"] is True
    assert QuantConfig(kind="8bit").facts == {"kind": "8bit"}


def test_what_cannot_be_packed_stays() -> None:
    model = tiny_models.build("mixtral")
    experts = model.model.layers[0].mlp.experts
    assert can_pack(experts)
    experts.has_bias = True
    assert not can_pack(experts)
    del experts.has_bias  # a class that does not ask transformers for its forward
    assert not can_pack(experts)
    assert not can_pack(tiny_models.build("llama").model.layers[0].mlp)
