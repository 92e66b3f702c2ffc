"""Batched decoding gives the same tokens as transformers' `generate` for each row alone."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace
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
from ftlevel.models.hardware import evaluating
from ftlevel.trained.generation import GenerationOptions

PROMPTS = [[5 + (i * 7 + k * k) % 400 for k in range(3 + (i * 11) % 29)] for i in range(11)]
MAX_NEW_TOKENS = 12


def generate_alone(model: Any, prompt: list[int], stops: list[int]) -> list[int]:
    output = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=stops, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
def test_batched_decoding_matches_generate(family):
    model = tiny_models.build(family, "causal").eval()
    with torch.no_grad():
        unstopped = [generate_alone(model, prompt, [703]) for prompt in PROMPTS]
        counts = {
            token: sum(token in text for text in unstopped) for text in unstopped for token in text
        }
        stops = [max((c, token) for token, c in counts.items() if c < len(unstopped))[1]]
        expected = [generate_alone(model, prompt, stops) for prompt in PROMPTS]
        assert len({len(text) for text in expected}) > 1
        assert get_decoder_limitation(model, "decoder", "lora") == ""
        with closing(RowDecoder(model, stops, 0)) as decoder:
            assert get_decoder_error(decoder, model, PROMPTS[2], 1e-4) == ""
            for size in (1, 3, 16):
                assert decoder(PROMPTS, MAX_NEW_TOKENS, size) == expected, size
        assert [generate_alone(model, p, stops) for p in PROMPTS[:2]] == expected[:2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
def test_shared_prefix_is_computed_once(family, monkeypatch):
    model = tiny_models.build(family, "causal").eval()
    prefix = [9 + (k * 13) % 300 for k in range(20)]
    prompts = [[*prefix, *prompt] for prompt in PROMPTS]
    assert get_shared_prefix(prompts) == prefix
    num_tokens = []
    forward = RowDecoder._forward

    def counting_forward(self: RowDecoder, rows: Any, ids: torch.Tensor, *positions: int) -> None:
        num_tokens.append(ids.numel())
        forward(self, rows, ids, *positions)

    monkeypatch.setattr(RowDecoder, "_forward", counting_forward)
    with torch.no_grad():
        expected = [generate_alone(model, prompt, [703]) for prompt in prompts]
        with closing(RowDecoder(model, [703], 0)) as decoder:
            assert decoder(prompts, 1, 16) == [text[:1] for text in expected]
            assert num_tokens == [20, 11 * max(map(len, PROMPTS))]
            for size in (1, 3, 16):
                assert decoder(prompts, MAX_NEW_TOKENS, size) == expected, size
            assert decoder(PROMPTS, MAX_NEW_TOKENS, 4) == decoder(PROMPTS, MAX_NEW_TOKENS, 1)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_ended_row_at_last_position_does_not_disturb_younger_rows(family):
    old, short, young = list(range(5, 25)), [40, 41, 42, 43, 44, 45], [50, 51, 52, 53, 54]
    size = {"gpt2": "n_positions", "opt": "max_position_embeddings"}[family]
    overrides = {size: len(old) + MAX_NEW_TOKENS}
    model = tiny_models.build(family, "causal", **overrides).eval()
    prompts = [old, *[short] * 7, *[young] * 7]  # the old row ends alone, as one of eight
    with torch.no_grad():
        expected = [generate_alone(model, prompt, [703]) for prompt in prompts]
        first = expected[1][:4]
        assert all(expected[i][:4] != first for i in (0, -1))
        with closing(RowDecoder(model, [703], 0, lambda ids: list(ids[:4]) == first)) as decoder:
            outputs = decoder(prompts, MAX_NEW_TOKENS, 8)
    assert outputs == [expected[0], *[first] * 7, *expected[8:]]


@pytest.mark.parametrize(
    ("prompts", "prefix"),
    [([], []), ([[1, 2, 3]], [1, 2]), ([[1, 2], [1, 2]], [1]), ([[1, 2, 3], [1, 2]], [1]),
     ([[1, 2, 3], [1, 4]], [1]), ([[2], [1, 2]], [])],
)  # fmt: skip
def test_shared_prefix_leaves_one_token_per_prompt(prompts, prefix):
    assert get_shared_prefix(prompts) == prefix


def test_unsupported_models_report_limitation():
    windows, two_stacks = tiny_models.build("gemma3_text"), tiny_models.build("t5")
    assert "window" in get_decoder_limitation(windows, "decoder", "none")
    assert "one stack" in get_decoder_limitation(two_stacks, "encoder-decoder", "none")
    model = tiny_models.build("llama", "causal").eval()
    assert "virtual tokens" in get_decoder_limitation(model, "decoder", "p-tuning")
    model.generation_config = GenerationConfig(repetition_penalty=1.1, eos_token_id=2)
    limitation = get_decoder_limitation(model, "decoder", "lora")
    assert limitation == "its generation_config has repetition_penalty"


def test_wrong_cache_positions_are_detected(monkeypatch):
    model = tiny_models.build("llama", "causal").eval()
    original_join = decoding.join
    decoder = RowDecoder(model, [2], 0)

    def shift(parts: Any) -> Any:
        rows = original_join(parts)
        for layer in rows.layers:
            layer.keys.copy_(layer.keys.roll(1, 2))
        return rows

    monkeypatch.setattr(decoding, "join", shift)
    with torch.no_grad():
        assert "other scores" in get_decoder_error(decoder, model, PROMPTS[2], 1e-4)
    decoder.close()


def test_generation_ends_at_ids_of_generation_config():
    """transformers' `generate` does so by default; the tokenizer's EOS may be another id."""
    model = tiny_models.build("llama", "causal").eval()
    prompt = torch.tensor([PROMPTS[0]])
    unstopped = generate_alone(model, PROMPTS[0], [703])
    model.generation_config = GenerationConfig(eos_token_id=[702, unstopped[3]])
    kwargs = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12}
    expected = model.generate(prompt, do_sample=False, pad_token_id=0, **kwargs)
    tokenizer = SimpleNamespace(eos_token_id=703, pad_token_id=0)
    options = GenerationOptions(max_new_tokens=12).arguments(model, tokenizer)
    assert model.generate(prompt, **kwargs | options).equal(expected)
    assert expected.shape[1] < len(PROMPTS[0]) + len(unstopped)


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("decode", [True, False])
def test_language_head_gets_contiguous_input(num_rows, decode):
    """Also for one row: `is_contiguous` ignores the strides of dimensions of size 1."""
    model = tiny_models.build("llama", "causal").eval()
    strides = []
    model.lm_head.register_forward_hook(
        lambda _, args, __: strides.append((args[0].stride(), args[0].new_empty(args[0].shape)))
    )
    with evaluating(model, "cpu", "float32"):
        if decode:
            decoder = RowDecoder(model, [2], 0)
            decoder(PROMPTS[:num_rows], 3, num_rows)
            decoder.close()
        else:
            ids = torch.tensor([PROMPTS[0]] * num_rows)
            model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=703)
    assert len(strides) == 3
    assert all(stride == new.stride() for stride, new in strides)
    assert not model.lm_head._forward_pre_hooks
