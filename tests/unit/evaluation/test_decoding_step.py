"""The forward pass for one new token computes what transformers and PEFT compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn

import tiny_models
from ftlevel.evaluation import packed_weights
from ftlevel.evaluation.decoding import RowDecoder, get_decoder_error, join
from ftlevel.evaluation.decoding_step import DecodingStep
from ftlevel.evaluation.packed_weights import MAX_ROWS
from ftlevel.fast.fused_layers import FusedNormGlu
from ftlevel.models.upstream.tensors import packed_dtypes

pytestmark = pytest.mark.skipif(
    not packed_dtypes(), reason="weights are packed for oneDNN on x86-64 only"
)

PROMPTS = [[7, 8, 9, 10, 11, 12], [20, 30, 40], [9, 8, 7, 6, 5]]


@pytest.fixture(autouse=True)
def small_layers_are_packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(packed_weights, "MIN_SIZE", 1)
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows in each call of `DecodingStep`."""
    counts: list[int] = []
    original = DecodingStep.__call__

    def counting_call(self: DecodingStep, ids: torch.Tensor, *each: Any) -> torch.Tensor:
        counts.append(len(ids))
        return original(self, ids, *each)

    monkeypatch.setattr(DecodingStep, "__call__", counting_call)
    return counts


def build(family: str, targets: Any = "all-linear") -> Any:
    torch.manual_seed(0)
    model = tiny_models.build(family, "causal").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    if targets:
        config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.5, use_rslora=True)
        model = peft.get_peft_model(model, config).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model


def decode(model: Any, copies: int = 2) -> list[tuple[list[int], torch.Tensor]]:
    """Decode copies of each prompt; return sequences and their next logits.

    The first prompt's first copy ends after a token, and the third prompt starts then.
    """
    decoder = RowDecoder(model, (), 0)
    result = []

    def step(rows: Any, sequences: list[list[int]]) -> None:
        rows.last = [41 + len(result) + i for i in range(len(sequences))]
        for ids, token in zip(sequences, rows.last, strict=True):
            ids.append(token)
        decoder.step(rows)
        result.extend(zip(map(list, sequences), rows.scores, strict=True))

    rows = decoder.begin([0, 1], PROMPTS[:2]).fork(copies)
    sequences = [list(ids) for ids in PROMPTS[:2] for _ in range(copies)]
    step(rows, sequences)
    third = decoder.begin([2], PROMPTS[2:]).fork(copies)
    rows = join([(rows, range(1, 2 * copies)), (third, range(copies))])
    sequences = [*sequences[1:], *(list(PROMPTS[2]) for _ in range(copies))]
    step(rows, sequences)
    step(rows, sequences)
    decoder.close()
    return result


def get_error(model: Any, result: list[tuple[list[int], torch.Tensor]]) -> float:
    """Return the largest relative error of logits, against forward passes without a cache."""
    return max(
        float((logits - expected).norm() / expected.norm())
        for ids, logits in result
        for expected in [model(torch.tensor([ids])).logits[0, -1]]
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "up_proj"], []])
def test_logits_are_those_of_the_model(family, targets, calls):
    model = build(family, targets)
    result = decode(model)
    assert calls == [4, 5, 5]
    assert get_error(model, result) < 1e-5


def test_fused_modules_of_training_are_known(calls):
    model = build("llama").requires_grad_(False)
    fused = FusedNormGlu(model)
    assert fused.count > 4
    result = decode(model)
    fused.remove()
    assert calls == [4, 5, 5]
    assert get_error(model, result) < 1e-5


@pytest.mark.skipif(torch.bfloat16 not in packed_dtypes(), reason="no bfloat16 units")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_as_little_as_the_model(dtype, calls):
    model = build("qwen3")
    exact = decode(model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:  # as in training
            parameter.data = parameter.data.to(dtype)
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = decode(model)
        error = get_error(model, exact)
    assert calls == [4, 5, 5]
    assert 1e-3 < error < 1e-1
    for (_, logits), (_, expected) in zip(result, exact, strict=True):
        assert (logits - expected).norm() < 1.2 * error * expected.norm()


@pytest.mark.parametrize("method", ["ln_tuning", "gemma3_text", "hook", "many", "disabled"])
def test_other_models_use_their_own_forward(method, calls):
    copies = 2
    if method == "gemma3_text":
        model = build("gemma3_text")
    elif method == "ln_tuning":
        config = peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(build("llama", []), config).eval()
    else:
        model = build("llama")
    if method == "hook":
        layer = model.base_model.model.model.layers[1]
        layer.register_forward_hook(lambda *each: 1.5 * each[2])
    if method == "many":
        copies = MAX_ROWS
    if method == "disabled":
        with model.disable_adapter():
            result = decode(model)
            assert get_error(model, result) < 1e-5
    else:
        result = decode(model, copies)
        assert get_error(model, result) < 1e-5
    assert not calls


def test_a_wrong_step_is_found(monkeypatch):
    model = build("llama")
    decoder = RowDecoder(model, (), 0)
    assert not get_decoder_error(decoder, model, PROMPTS[0], 1e-4, forks=True)
    monkeypatch.setattr(decoder._step, "_scales", 1.01 * decoder._step._scales)
    assert "other scores" in get_decoder_error(decoder, model, PROMPTS[0], 1e-4, forks=True)
    decoder.close()


def test_check_ignores_a_constant_that_bfloat16_rounds(monkeypatch):
    model = build("llama")
    original = RowDecoder.step

    def shifted_step(self: RowDecoder, rows: Any) -> None:
        original(self, rows)
        rows.scores = 100 + rows.scores

    monkeypatch.setattr(RowDecoder, "step", shifted_step)
    decoder = RowDecoder(model, (), 0)
    assert not get_decoder_error(decoder, model, PROMPTS[0], 1e-3)
    decoder.close()
