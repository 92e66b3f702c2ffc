"""Tests that `builtin:tiny-llama` is small, loads offline and predicts held-out docstrings."""

import math
import random
import socket

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlevel.data.sources.docstrings import load_docstrings
from ftlevel.errors import InputError
from ftlevel.models.sources import MODELS, builtin_path

MAX_BYTES = 6_000_000
CONVERSATION = [
    {"role": "user", "content": "Explain this Python function.\n\ndef f(x):\n    return x"},
    {"role": "assistant", "content": "Return the argument."},
]


@pytest.fixture(scope="module", params=MODELS)
def path(request):
    return builtin_path(request.param)


@pytest.fixture(scope="module")
def tokenizer(path):
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_model_files_exist_and_are_small(path):
    names = {file.name for file in path.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in path.iterdir()) <= MAX_BYTES


def test_unknown_builtin_name_raises():
    with pytest.raises(InputError, match=r"no such model .* 'tiny-llama'\? .* builtin:tiny-llama"):
        builtin_path("tiny-lama")


def test_model_loads_without_network(path, monkeypatch):
    def raise_error(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", raise_error)
    monkeypatch.setattr(socket, "getaddrinfo", raise_error)
    AutoTokenizer.from_pretrained(path)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.dtype == torch.bfloat16
    assert all(weight.isfinite().all() for weight in loaded.parameters())


def test_layer_shapes_support_quantization(model):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert module.in_features % 64 == 0, name
            assert module.out_features % 32 == 0, name
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_special_tokens_match_model_config(model, tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id is None
    for settings in (model.config, model.generation_config):
        assert settings.eos_token_id == tokenizer.eos_token_id
        assert settings.pad_token_id == tokenizer.pad_token_id
        assert settings.bos_token_id is None
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("plain").input_ids[-1] != tokenizer.eos_token_id


def test_tokenizer_round_trips_text(tokenizer):
    generator = random.Random(0)
    texts = [
        "  indented\n\n\ttabs \r\n trailing  ",
        "naïve café — 東京 🚀 \u200b",
        "x .  y , it 's  ' quoted '",
        "".join(chr(generator.randrange(1, 0xD7FF)) for _ in range(500)),
    ]
    texts += [row["prompt"] for row in load_docstrings("generation", "validation")]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_is_chatml(tokenizer):
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == (
        "<|im_start|>user\nExplain this Python function.\n\ndef f(x):\n    return x<|im_end|>\n"
        "<|im_start|>assistant\nReturn the argument.<|im_end|>\n"
    )


@pytest.mark.parametrize("answer", ["Return it.", "    return x", "`x`", "1. First", "é", "(x)"])
def test_rendered_prompt_is_token_prefix_of_conversation(tokenizer, answer):
    messages = [CONVERSATION[0], {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=True
    ).input_ids
    conversation = tokenizer.apply_chat_template(messages, return_dict=True).input_ids
    assert conversation[: len(prompt)] == prompt
    assert tokenizer.decode(conversation[len(prompt) :]) == answer + "<|im_end|>\n"


def test_assistant_mask_covers_answer_and_end_token(tokenizer):
    second = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rendered = tokenizer.apply_chat_template(
        CONVERSATION + second, return_dict=True, return_assistant_tokens_mask=True
    )
    answer_ids = [
        token
        for token, is_answer in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
        if is_answer
    ]
    assert tokenizer.decode(answer_ids) == "Return the argument.<|im_end|>So.<|im_end|>"


def test_model_predicts_held_out_docstrings(model, tokenizer):
    rows = load_docstrings("generation", "validation", limit=32)
    nats, size = 0.0, 0
    for row in rows:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(row["completion"]).input_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        size += len(row["completion"].encode())
    bits_per_byte = nats / math.log(2) / size
    # A uniform prediction needs log2(3072) bits per token, 4.3 per byte.
    assert (
        bits_per_byte < 1.9
    )  # measured: 1.617 on Python 3.11; the rows depend on the Python version
