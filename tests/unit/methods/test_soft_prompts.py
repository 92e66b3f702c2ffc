"""Tests of the position and of the initialization of soft prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftlevel.config.methods.other import PromptSpec, PTuningSpec
from ftlevel.errors import ConfigError
from ftlevel.methods import METHODS
from ftlevel.methods.soft_prompt import get_layer_stacks
from ftlevel.methods.soft_prompt.layer import PromptPosition
from tiny_models import HEADS, build, build_batch, compute_logits
from tiny_tokenizers import build_tokenizer
from virtual_tokens import adapt, describe_base

PROMPT = PromptSpec(num_virtual_tokens=4)
MLP = PTuningSpec(num_virtual_tokens=4)
LSTM = PTuningSpec(
    num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
)


@pytest.mark.parametrize(
    ("family", "head", "stacks"),
    [
        ("llama", "causal", ["model"]),
        ("opt", "causal", ["model.decoder"]),
        ("bert", "mlm", ["bert"]),
        ("t5", "seq2seq", ["encoder", "decoder"]),
        ("t5", "qa", ["encoder", "decoder"]),
        ("t5", "tokcls", ["transformer.encoder"]),
        ("bart", "seqcls", ["model.encoder", "model.decoder"]),
    ],
)
def test_get_layer_stacks_finds_stacks_with_token_input(family, head, stacks):
    assert get_layer_stacks(build(family, head)) == stacks


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "t5"])
def test_prompt_of_token_embeddings_equals_those_tokens(family):
    """Virtual tokens that equal the embeddings of four tokens act like these tokens."""
    head, tokens = HEADS[family][0], torch.tensor([11, 12, 13, 14])
    model, base = adapt(PROMPT, family, head), build(family, head)
    embeddings = base.get_submodule(get_layer_stacks(base)[0]).get_input_embeddings()
    prompt = model.base_model.layers()[0].soft_prompt_embedding["default"]
    with torch.no_grad():
        prompt.copy_(embeddings(tokens))
    inputs = build_batch(family, head)
    if head == "causal":
        del inputs["labels"]
    tokens = tokens.expand(2, -1)
    prefixed = {
        **inputs,
        "input_ids": torch.cat([tokens, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(tokens), inputs["attention_mask"]], 1),
    }
    expected = compute_logits(base, prefixed)
    expected = expected if head == "seq2seq" else expected[:, 4:]
    torch.testing.assert_close(compute_logits(model, inputs), expected)


def test_prompt_is_inserted_after_cls_in_encoder():
    """BERT's pooler reads the first position, which must not be the prompt."""
    base = build("bert", "seqcls")
    model = adapt(PROMPT, "bert", "seqcls", base)
    hidden_states = []
    base.bert.encoder.register_forward_pre_hook(lambda _, args: hidden_states.append(args[0]))
    inputs = build_batch("bert", "seqcls")
    compute_logits(model, {n: inputs[n] for n in ("input_ids", "attention_mask")})
    with model.disable_adapter():
        compute_logits(model, {n: inputs[n] for n in ("input_ids", "attention_mask")})
    assert hidden_states[0].shape[1] == hidden_states[1].shape[1] + 4
    assert torch.equal(hidden_states[0][:, 0], hidden_states[1][:, 0])


def test_prompt_position_with_left_and_right_padding():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    layout = PromptPosition.compute(mask, mask, 2, 0)
    states = torch.tensor([[1, 2, 3, 0], [0, 0, 1, 2]])
    prompt = torch.tensor([[8, 9], [8, 9]])
    with_prompt = layout.insert(states, prompt)
    assert with_prompt.tolist() == [[8, 9, 1, 2, 3, 0], [0, 0, 8, 9, 1, 2]]
    assert torch.equal(layout.remove(with_prompt), states)
    assert layout.extend_mask(mask).tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    positions = torch.tensor([[0, 1, 2, 2], [0, 0, 0, 1]])
    assert layout.extend_positions(positions).tolist() == [[0, 1, 2, 3, 4, 4], [0, 0, 0, 1, 2, 3]]


def test_prompt_position_after_leading_tokens():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    layout = PromptPosition.compute(mask, mask, 2, 1)
    rows = layout.insert(torch.tensor([[1, 2, 3]] * 3), torch.tensor([[8, 9]] * 3))
    assert rows.tolist() == [[1, 8, 9, 2, 3]] * 3
    positions = layout.extend_positions(torch.arange(3)[None])
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_four_dimensional_attention_mask_raises():
    model = adapt(PROMPT, "llama", "causal")
    with pytest.raises(ValueError, match="4 dimensions"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 3))


def test_prompt_is_initialized_from_text():
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a b"}
    spec, tokenizer = PromptSpec(num_virtual_tokens=5, **text), build_tokenizer("llama")
    base = replace(describe_base(spec, build("llama"), "causal"), tokenizer=tokenizer)
    ids = METHODS["prompt"].build(spec, base).init_token_ids
    assert tokenizer.decode(ids).strip() == "a b"
    with pytest.raises(ValueError, match="tokenizer"):
        METHODS["prompt"].build(spec, replace(base, tokenizer=None))
    for name, value in text.items():
        with pytest.raises(ConfigError, match="prompt_tuning_init"):
            PromptSpec(**{name: value})


def test_finish_keeps_only_prompt_of_p_tuning():
    model = adapt(LSTM, "llama", "causal")
    METHODS["p-tuning"].finish(model)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["base_model.model.model.soft_prompt.soft_prompt_embedding.default"]
    assert model.peft_config["default"].encoder == "none"


def test_model_reading_input_ids_in_every_layer_is_unsupported():
    from transformers import AutoConfig

    config = AutoConfig.for_model("gemma3n_text")
    assert "reads the ids" in METHODS["prompt"].get_error(PROMPT, config, "decoder", "", "none")
    assert METHODS["prompt"].get_error(PROMPT, build("llama").config, "decoder", "", "none") is None
