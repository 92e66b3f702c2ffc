"""Packed linear layers and their LoRA compute what torch and PEFT compute."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny_models
from ftlevel.evaluation import packed_weights
from ftlevel.evaluation.decoding import get_decoder_error
from ftlevel.evaluation.packed_weights import MAX_ROWS, PackedWeights
from ftlevel.extras.rl.sampling import GroupSampler
from ftlevel.models.upstream.tensors import pack_linear, packed_dtypes

pytestmark = pytest.mark.skipif(
    not packed_dtypes(), reason="weights are packed for oneDNN on x86-64 only"
)


class Layers(nn.Module):
    """Three layers large enough to be packed and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(256, 320)
        self.second = Conv1D(288, 320)
        self.head = nn.Linear(288, 512, bias=False)
        self.small = nn.Linear(512, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.head(self.second(self.first(x).relu()))
        return torch.cat([hidden, self.small(hidden)], -1)


@pytest.fixture
def lora() -> Any:
    config = peft.LoraConfig(r=4, target_modules=["first", "head"], lora_dropout=0.5)
    model = peft.get_peft_model(Layers(), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


class Gated(nn.Module):
    """Layers with names that share an input; with `is_mixed`, `up_proj` has another one."""

    def __init__(self, bias: bool = False, is_mixed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(256, 320, bias)
        self.k_proj = nn.Linear(256, 256, bias)
        self.v_proj = nn.Linear(256, 256, bias)
        self.gate_proj = nn.Linear(256, 512, bias)
        self.up_proj = nn.Linear(256, 512, bias)
        self._is_mixed = is_mixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        for at in range(len(states)):
            states[at] += at  # in place, as some models scale their queries
        gate = self.gate_proj(x)
        up = self.up_proj(x + 1 if self._is_mixed else x)
        return torch.cat([*states, self.k_proj(x), gate * up], -1)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("rows", [(1, 1), (8, 1), (MAX_ROWS,), (MAX_ROWS + 1,), (3, 50), (0, 4)])
def test_outputs_are_those_of_peft(lora, rows):
    x = torch.randn(*rows, 256)
    expected = lora(x)
    packed = PackedWeights(lora)
    try:
        assert torch.allclose(lora(x), expected, rtol=1e-5, atol=1e-5)
        strided = torch.randn(*rows, 512)[..., ::2]
        assert torch.allclose(lora(strided), lora(strided.contiguous()), rtol=1e-5, atol=1e-5)
    finally:
        packed.close()
    assert not any("forward" in vars(module) for module in lora.modules())
    assert torch.equal(lora(x), expected)


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "gate_proj"], []])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_with_one_input_are_one_product(targets, bias, is_mixed, dtype, monkeypatch):
    if dtype not in packed_dtypes():
        pytest.skip("no bfloat16 units")
    model: Any = Gated(bias, is_mixed).eval()
    if targets:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    exact = model.to(torch.float32)(x := torch.randn(2, 3, 256))
    model.to(dtype)
    before, expected = model.state_dict(), model(x.to(dtype))
    before = {name: tensor.clone() for name, tensor in before.items()}
    calls = []
    product = packed_weights.packed_linear
    monkeypatch.setattr(
        packed_weights, "packed_linear", lambda *each: calls.append(1) or product(*each)
    )
    packed = PackedWeights(model)
    outputs = [model(x.to(dtype)) for _ in range(2)]
    error = (outputs[0].float() - exact).norm()
    assert error <= 1.1 * (expected.float() - exact).norm() + 1e-6 * exact.norm()
    assert torch.equal(*outputs)
    # k_proj is called twice; a partner that got another input computes its own.
    assert len(calls) == 2 * (3 + is_mixed)
    packed.close()
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert torch.equal(model(x.to(dtype)), expected)


def test_few_rows_use_the_packed_copies(lora):
    x = torch.randn(4, 256)
    packed = PackedWeights(lora)
    before = lora(x)
    lora.base_model.model.second.weight.zero_()  # not in the copy
    assert torch.equal(lora(x), before)
    assert not torch.equal(lora(torch.randn(MAX_ROWS + 1, 256))[:4], before)
    packed.close()
    assert not torch.allclose(lora(x), before)


def test_autocast_and_gradients_and_training_behave_as_without(lora):
    x = torch.randn(4, 256)
    expected = lora(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = lora(x)
        packed = PackedWeights(lora)
        assert lora(x).dtype == low.dtype == torch.bfloat16
        assert (lora(x) - expected).norm() < 2 * (low - expected).norm() + 1e-3 * expected.norm()
    assert torch.allclose(lora(x), expected, rtol=1e-5, atol=1e-5)  # float32: no copies
    packed.close()
    packed = PackedWeights(lora)
    with lora.disable_adapter():
        plain = lora(x)
    with torch.enable_grad():
        lora(x).sum().backward()
    assert lora.base_model.model.first.lora_B.default.weight.grad is not None
    packed.close()
    with lora.disable_adapter():
        assert torch.allclose(plain, lora(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, expected, rtol=1e-2)


def test_an_error_without_the_copies_puts_them_back(lora):
    packed = PackedWeights(lora)
    with pytest.raises(RuntimeError, match="shapes"), packed.disabled():
        lora(torch.zeros(1, 3))
    assert any("forward" in vars(module) for module in lora.modules())
    packed.close()
    assert not any("forward" in vars(module) for module in lora.modules())


def test_nothing_is_packed_beyond_the_share_of_memory(lora, monkeypatch):
    size = 4 * (256 * 320 + 320 * 288 + 288 * 512)
    for memory, count in ((4 * size, 3), (4 * size - 4, 0)):
        monkeypatch.setattr(packed_weights, "device_memory", lambda _, memory=memory: memory)
        packed = PackedWeights(lora)
        assert sum("forward" in vars(module) for module in lora.modules()) == count
        packed.close()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_variants_of_lora_keep_their_own_forward(options):
    config = peft.LoraConfig(r=4, target_modules=["first"], **options)
    model: Any = peft.get_peft_model(Layers(), config).eval()
    model.base_model.model.first.lora_B.default.weight.normal_()
    x = torch.randn(4, 256)
    expected = model(x)
    packed = PackedWeights(model)
    assert "forward" not in vars(model.base_model.model.first)
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    packed.close()


def test_wrongly_packed_weights_are_found_by_the_check_of_the_decoder(monkeypatch):
    model = tiny_models.build("llama", "causal", hidden_size=256, intermediate_size=512).eval()
    prompt = list(range(5, 20))

    def find_error() -> str:
        decoder = GroupSampler(model, types.SimpleNamespace(pad_token_id=0))
        try:
            return get_decoder_error(decoder, model, prompt, 1e-4, forks=True)
        finally:
            decoder.close()

    assert not find_error()
    monkeypatch.setattr(
        packed_weights, "pack_linear", lambda weight, rows: pack_linear(weight * 1.01, rows)
    )
    assert "other scores" in find_error()
