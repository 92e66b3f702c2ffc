"""`builtin:tiny-llama`: it is small, loads as it is, and predicts text that it never read."""

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


def test_the_files_are_there_and_small(path):
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


def test_an_unknown_name_is_an_input_error():
    with pytest.raises(InputError, match=r"no such model .* 'tiny-llama'\? .* builtin:tiny-llama"):
        builtin_path("tiny-lama")


def test_it_loads_without_a_network(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    AutoTokenizer.from_pretrained(path)
    stored = AutoModelForCausalLM.from_pretrained(path)
    assert stored.dtype == torch.bfloat16
    assert all(weight.isfinite().all() for weight in stored.parameters())


def test_its_shapes_suit_quantization(model):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert module.in_features % 64 == 0, name
            assert module.out_features % 32 == 0, name
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_special_tokens_are_distinct_and_agree_with_the_model(model, tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id is None
    for settings in (model.config, model.generation_config):
        assert settings.eos_token_id == tokenizer.eos_token_id
        assert settings.pad_token_id == tokenizer.pad_token_id
        assert settings.bos_token_id is None
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("plain").input_ids[-1] != tokenizer.eos_token_id


def test_the_tokenizer_gives_every_text_back(tokenizer):
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


def test_the_chat_template_is_chatml(tokenizer):
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == (
        "<|im_start|>user\nExplain this Python function.\n\ndef f(x):\n    return x<|im_end|>\n"
        "<|im_start|>assistant\nReturn the argument.<|im_end|>\n"
    )


@pytest.mark.parametrize("answer", ["Return it.", "    return x", "`x`", "1. First", "é", "(x)"])
def test_a_rendered_prompt_is_a_token_prefix_of_the_conversation(tokenizer, answer):
    messages = [CONVERSATION[0], {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=True
    ).input_ids
    whole = tokenizer.apply_chat_template(messages, return_dict=True).input_ids
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == answer + "<|im_end|>\n"


def test_the_template_marks_the_answer_and_its_end(tokenizer):
    second = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rendered = tokenizer.apply_chat_template(
        CONVERSATION + second, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [
        token
        for token, mark in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
        if mark
    ]
    assert tokenizer.decode(marked) == "Return the argument.<|im_end|>So.<|im_end|>"


def test_it_predicts_docstrings_of_modules_it_never_read(model, tokenizer):
    rows = load_docstrings("generation", "validation", limit=32)
    nats, size = 0.0, 0
    for row in rows:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(row["completion"]).input_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        size += len(row["completion"].encode())
    bits_per_byte = nats / math.log(2) / size
    # A model that knows nothing needs log2(3072) bits a token, 4.3 a byte.
    assert bits_per_byte < 1.9  # measured: 1.617 on Python 3.11; other versions have other rows
