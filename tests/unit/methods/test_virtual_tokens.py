"""Tests of prefixes and soft prompts on every family and head: training, reload, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ftlevel.config.methods.other import PrefixSpec, PromptSpec, PTuningSpec
from ftlevel.methods import METHODS
from ftlevel.models.module_tree import get_heads
from ftlevel.trained.adapt import load_adapter
from sampling import sample
from tiny_models import FAMILIES, FAMILY_HEADS, HEADS, build, build_batch, compute_logits
from virtual_tokens import adapt

PREFIX = PrefixSpec(num_virtual_tokens=4)
PROJECTED = PrefixSpec(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16)
PROMPT = PromptSpec(num_virtual_tokens=4)
MLP = PTuningSpec(num_virtual_tokens=4)
LSTM = PTuningSpec(
    num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
)
PROJECTED_CELLS = [("llama", "causal"), ("bert", "seqcls"), ("t5", "seq2seq")]
P_TUNING_CELLS = [("llama", "causal"), ("gemma3_text", "seqcls"), ("bert", "tokcls"),
                  ("bart", "seq2seq")]  # fmt: skip
GENERATIVE_FAMILIES = [family for family in FAMILIES if HEADS[family][0] in ("causal", "seq2seq")]
LENGTH, PADDED, NEW = 9, 4, 5

both_kinds = pytest.mark.parametrize("spec", [PREFIX, PROMPT], ids=lambda spec: spec.kind)


def train_two_steps(model: Any, inputs: dict[str, torch.Tensor]) -> set[str]:
    """Train `model` and return the trainable tensors that had no gradient in either step."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    idle = set(parameters)
    for _ in range(2):
        model(**inputs).loss.backward()
        idle -= {n for n, p in parameters.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    return idle


@pytest.mark.parametrize(
    ("spec", "family", "head"),
    [*(case for spec in (PREFIX, PROMPT) for case in sample([(spec, *c) for c in FAMILY_HEADS])),
     *((PROJECTED, *cell) for cell in PROJECTED_CELLS),
     *((spec, *cell) for spec in (MLP, LSTM) for cell in P_TUNING_CELLS)],
)  # fmt: skip
def test_virtual_tokens_are_trained_saved_and_reloaded(spec, family, head, tmp_path):
    inputs = build_batch(family, head)
    before = compute_logits(build(family, head), inputs)
    model = adapt(spec, family, head)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    names = ".prefix_kv_" if spec.kind == "prefix" else ".soft_prompt_"
    assert all(names in n or ".modules_to_save.default." in n for n in trainable)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in trainable}

    assert train_two_steps(model, inputs) == set()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    logits = compute_logits(model, inputs)
    assert logits.shape == before.shape  # shapes are those of the base
    assert not torch.allclose(logits, before, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(compute_logits(model, inputs), before)

    METHODS[spec.kind].finish(model)
    torch.testing.assert_close(compute_logits(model, inputs), logits, atol=1e-5, rtol=1e-5)
    logits = compute_logits(model, inputs)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    other_head = build(family, head, seed=0)
    for name in get_heads(other_head) if head in ("seqcls", "tokcls", "qa") else []:
        for parameter in other_head.get_submodule(name).parameters():
            torch.nn.init.normal_(parameter)  # must be replaced by the saved head
    loaded = load_adapter(other_head, tmp_path)
    assert torch.equal(compute_logits(loaded, inputs), logits)
    if head != "seq2seq":
        check_padding(model, head, inputs)


def check_padding(model: Any, head: str, inputs: dict[str, torch.Tensor]) -> None:
    """Check that the first row's logits do not depend on its three padding positions."""
    num_tokens = int(inputs["attention_mask"][0].sum())
    batch = {n: inputs[n] for n in ("input_ids", "attention_mask")}
    unpadded = {n: value[:1, :num_tokens] for n, value in batch.items()}
    padded, single = compute_logits(model, batch)[:1], compute_logits(model, unpadded)
    if head == "qa":
        padded = torch.cat([part[:, :num_tokens] for part in padded.chunk(2, -1)], -1)
    elif head != "seqcls":
        padded = padded[:, :num_tokens]
    torch.testing.assert_close(padded, single, atol=2e-5, rtol=1e-4)


def generate_greedily(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Return `NEW` greedy tokens after `row` (1, seq), without cache."""
    seq2seq, config = model.config.is_encoder_decoder, model.config
    generated = torch.tensor([[config.decoder_start_token_id]]) if seq2seq else row
    for _ in range(NEW):
        inputs = {"input_ids": row, "decoder_input_ids": generated}
        with torch.no_grad():
            logits = model(
                **inputs if seq2seq else {"input_ids": generated}, use_cache=False
            ).logits
        logits[:, -1, config.eos_token_id] = -torch.inf
        generated = torch.cat([generated, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return generated[:, -NEW:]


@both_kinds
@pytest.mark.parametrize("family", GENERATIVE_FAMILIES)
def test_left_padded_rows_generate_as_a_greedy_loop_with_and_without_cache(spec, family):
    model = adapt(spec, family, HEADS[family][0])
    train_two_steps(model, build_batch(family))
    ids = build_batch(family, length=LENGTH)["input_ids"][1:]
    batch = torch.cat([ids, torch.cat([torch.zeros_like(ids[:, :PADDED]), ids[:, PADDED:]], 1)])
    mask = torch.ones_like(batch)
    mask[1, :PADDED] = 0
    expected = torch.cat([generate_greedily(model, row) for row in (ids, ids[:, PADDED:])])
    for use_cache in (True, False):
        generated = model.generate(
            input_ids=batch, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW,
            do_sample=False, use_cache=use_cache, pad_token_id=0,
        )  # fmt: skip
        assert torch.equal(generated[:, -NEW:], expected), f"use_cache={use_cache}"


@both_kinds
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "albert"])  # cannot be checkpointed
def test_gradients_with_checkpointing_match(spec, family):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = adapt(spec, family, HEADS[family][0]).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(1)  # of dropout
        model(**build_batch(family), use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@both_kinds
def test_two_adapters_are_active_and_unload_restores_model(spec, tmp_path):
    inputs, base = build_batch("llama"), build("llama")
    before, implementation = compute_logits(base, inputs), base.config._attn_implementation
    model = adapt(spec, "llama", "causal", base)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    first = compute_logits(model, inputs)
    model.load_adapter(str(tmp_path), "other")
    model.set_adapter("other")
    assert torch.equal(compute_logits(model, inputs), first)
    model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(compute_logits(model, inputs), first)
    model.delete_adapter("other")
    assert torch.equal(compute_logits(model, inputs), first)
    plain = model.unload()
    assert plain.config._attn_implementation == implementation
    assert torch.equal(compute_logits(plain, inputs), before)
