"""Rows that come and go write what transformers' `generate` writes, each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import tiny_models
from ftlevel.evaluation import decoding
from ftlevel.evaluation.decoding import (
    RowDecoder,
    get_decoder_error,
    get_decoder_limitation,
    get_shared_prefix,
)

PROMPTS = [[5 + (i * 7 + k * k) % 400 for k in range(3 + (i * 11) % 29)] for i in range(11)]
MOST = 12


def alone(model: Any, prompt: list[int], stops: list[int]) -> list[int]:
    written = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
        max_new_tokens=MOST, do_sample=False, eos_token_id=stops, pad_token_id=0,
    )  # fmt: skip
    return written[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
def test_each_row_is_what_generate_writes_alone(family: str) -> None:
    model = tiny_models.build(family, "causal").eval()
    with torch.no_grad():
        plain = [alone(model, prompt, [703]) for prompt in PROMPTS]
        counts = {token: sum(token in text for text in plain) for text in plain for token in text}
        stops = [max((c, token) for token, c in counts.items() if c < len(plain))[1]]
        expected = [alone(model, prompt, stops) for prompt in PROMPTS]
        assert len({len(text) for text in expected}) > 1
        assert get_decoder_limitation(model, "decoder", "lora") == ""
        decoder = RowDecoder(model, stops, 0)
        try:
            assert get_decoder_error(decoder, model, PROMPTS[2], 1e-4) == ""
            for size in (1, 3, 16):
                assert decoder(PROMPTS, MOST, size) == expected, size
        finally:
            decoder.close()
        assert [alone(model, p, stops) for p in PROMPTS[:2]] == expected[:2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
def test_what_prompts_begin_with_is_computed_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build(family, "causal").eval()
    beginning = [9 + (k * 13) % 300 for k in range(20)]
    prompts = [[*beginning, *prompt] for prompt in PROMPTS]
    assert get_shared_prefix(prompts) == beginning
    fed = []
    forward = RowDecoder._forward

    def counted(self: RowDecoder, rows: Any, ids: torch.Tensor, *places: int) -> None:
        fed.append(ids.numel())
        forward(self, rows, ids, *places)

    monkeypatch.setattr(RowDecoder, "_forward", counted)
    with torch.no_grad():
        expected = [alone(model, prompt, [703]) for prompt in prompts]
        decoder = RowDecoder(model, [703], 0)
        try:
            assert decoder(prompts, 1, 16) == [text[:1] for text in expected]
            assert fed == [20, 11 * max(map(len, PROMPTS))]
            for size in (1, 3, 16):
                assert decoder(prompts, MOST, size) == expected, size
            assert decoder(PROMPTS, MOST, 4) == decoder(PROMPTS, MOST, 1)
        finally:
            decoder.close()


@pytest.mark.parametrize(
    ("prompts", "common"),
    [([], []), ([[1, 2, 3]], [1, 2]), ([[1, 2], [1, 2]], [1]), ([[1, 2, 3], [1, 2]], [1]),
     ([[1, 2, 3], [1, 4]], [1]), ([[2], [1, 2]], [])],
)  # fmt: skip
def test_a_prompt_has_a_token_of_its_own(prompts: list[list[int]], common: list[int]) -> None:
    assert get_shared_prefix(prompts) == common


def test_what_is_left_to_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "window" in get_decoder_limitation(
        tiny_models.build("gemma3_text", "causal"), "decoder", "none"
    )
    assert "one stack" in get_decoder_limitation(
        tiny_models.build("t5", "seq2seq"), "encoder-decoder", "none"
    )
    model = tiny_models.build("llama", "causal").eval()
    assert "virtual tokens" in get_decoder_limitation(model, "decoder", "p-tuning")
    model.generation_config = GenerationConfig(repetition_penalty=1.1, eos_token_id=2)
    assert (
        get_decoder_limitation(model, "decoder", "lora")
        == "its generation_config has repetition_penalty"
    )


def test_a_model_that_mixes_places_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama", "causal").eval()
    honest = decoding.join
    decoder = RowDecoder(model, [2], 0)

    def shift(parts: Any) -> Any:
        rows = honest(parts)
        for layer in rows.layers:
            layer.keys.copy_(layer.keys.roll(1, 2))
        return rows

    monkeypatch.setattr(decoding, "join", shift)
    with torch.no_grad():
        assert "other scores" in get_decoder_error(decoder, model, PROMPTS[2], 1e-4)
    decoder.close()


def test_the_head_reads_its_weight_once_for_all_prompts() -> None:
    model = tiny_models.build("llama", "causal").eval()
    strides = []
    model.lm_head.register_forward_hook(lambda _, args, __: strides.append(args[0].is_contiguous()))
    decoder = RowDecoder(model, [2], 0)
    with torch.no_grad():
        decoder(PROMPTS[:2], 3, 2)
    decoder.close()
    assert len(strides) == 3
    assert all(strides)
    assert not model.lm_head._forward_pre_hooks
