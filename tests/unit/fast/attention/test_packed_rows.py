"""Tests that packed batches match padded ones, for every family that supports packing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
from ftlevel.fast import packed_attention as attention
from ftlevel.fast.cross_entropy import ChunkedCrossEntropy
from ftlevel.fast.packing import PackedLayout, PackedModel, using_layout

LENGTHS = (7, 40, 3, 19, 19, 1)
PADDED = {"pad_token_id": 1}
DECODERS = ("gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3",
            "mixtral", "qwen3_moe")  # fmt: skip
ENCODERS = ("bert", "roberta", "distilbert", "electra", "albert", "modernbert")
CELLS = [(family, head) for family in (*DECODERS, *ENCODERS) for head in tiny_models.HEADS[family]]


def build(family: str, head: str, **overrides: Any) -> Any:
    """Return a tiny model with a nonzero LoRA, in eval mode, without dropout."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(tiny_models.build(family, head, **overrides), config).eval()


def create_batch(model: Any, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, Any]:
    """Return a batch of sequences of `lengths`, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(10, 490, (len(lengths), longest), generator=generator)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    return {"input_ids": torch.where(mask == 1, ids, model.config.pad_token_id or 0),
            "attention_mask": mask}  # fmt: skip


def compute_outputs_and_gradients(model, batch):
    """Return the logits of real tokens, and the gradient of their weighted sum."""
    model.zero_grad()
    is_causal = "Causal" in type(model.get_base_model()).__name__
    output = model(**batch, **({"use_cache": False} if is_causal else {}))
    if hasattr(output, "start_logits"):
        logits = torch.stack([output.start_logits, output.end_logits], -1)
    else:
        logits = output.logits
    real_logits = logits[batch["attention_mask"] == 1] if logits.dim() == 3 else logits
    weights = torch.linspace(-1, 1, real_logits.numel()).view_as(real_logits)
    (real_logits.double() * weights).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return real_logits.detach(), torch.cat(gradients)


def compute_packed(
    model: Any, batch: dict[str, Any], *, is_for_answers: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    base = model.get_base_model()
    attention.register()
    base.set_attn_implementation(attention.NAME)
    packing = PackedModel(base)
    try:
        layout = PackedLayout.from_mask(batch["attention_mask"])
        with using_layout(replace(layout, is_for_answers=is_for_answers)):
            return compute_outputs_and_gradients(model, batch)
    finally:
        packing.remove()
        base.set_attn_implementation("sdpa")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3_text", "modernbert"])
def test_packed_answer_logits_match_padded(family):
    """With grouped heads, windows and encoders; neighbors of equal length form a batch."""
    model = build(family, tiny_models.HEADS[family][0])
    batch = create_batch(model)
    expected, _ = compute_outputs_and_gradients(model, batch)
    actual, _ = compute_packed(model, batch, is_for_answers=True)
    assert relative(actual, expected) < 1e-5


def check_packed(model, batch, **options):
    """Check that logits and gradients of the packed batch are those of the padded one."""
    expected = compute_outputs_and_gradients(model, batch)
    for a, b in zip(compute_packed(model, batch, **options), expected, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize(("family", "head"), CELLS)
def test_packed_matches_padded(family, head):
    model = build(family, head)
    check_packed(model, create_batch(model))


@pytest.mark.parametrize("family", ["roberta", "opt", "llama"])
def test_pad_token_inside_a_text_keeps_its_position(family):
    """RoBERTa gives it the position of padding and does not count it; other models count it."""
    model = build(family, tiny_models.HEADS[family][0], **({} if family == "roberta" else PADDED))
    batch = create_batch(model)
    batch["input_ids"][1, 5:8] = model.config.pad_token_id
    check_packed(model, batch)


@pytest.mark.parametrize(("family", "embedding", "norm"), [
    ("llama", "model.embed_tokens", "model.norm"), ("gpt2", "transformer.wpe", "transformer.ln_f"),
    ("gemma3_text", "model.embed_tokens", "model.norm"),
    ("opt", "model.decoder.embed_positions", "model.decoder.final_layer_norm"),
    ("bert", "bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"),
])  # fmt: skip
def test_embeddings_and_final_norm_compute_no_padding(family, embedding, norm):
    model = build(family, tiny_models.HEADS[family][0])
    base, batch = model.get_base_model(), create_batch(model)
    shapes = {}
    for name in (embedding, norm):
        base.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: shapes.update({name: output.shape[:2]})
        )
    attention.register()
    base.set_attn_implementation(attention.NAME)
    packing, head = PackedModel(base), ChunkedCrossEntropy(base)
    at = torch.tensor([0, 41, 42])  # flat positions: 40 is the longest row
    with using_layout(PackedLayout.from_mask(batch["attention_mask"])):
        likelihoods = head.likelihoods(lambda: model(**batch), at, torch.tensor([11, 12, 13]))
    packing.remove()
    head.remove()
    assert set(shapes.values()) == {(1, sum(LENGTHS))}
    base.set_attn_implementation("sdpa")
    logits = model(**batch).logits.flatten(0, 1)[at].log_softmax(-1)
    chosen = logits[torch.arange(3), torch.tensor([11, 12, 13])]
    assert torch.allclose(likelihoods, chosen, atol=1e-5)
