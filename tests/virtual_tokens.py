"""Shared tests of methods with virtual tokens, for any family and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ftlevel.methods import METHODS, Base
from ftlevel.models.kinds import model_kind
from ftlevel.models.module_tree import get_heads
from ftlevel.trained.adapt import apply_method, load_adapter
from tiny_models import FAMILIES, build, build_batch, compute_logits

TASK_TYPES = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "seqcls": "SEQ_CLS",
    "tokcls": "TOKEN_CLS",
    "qa": "QUESTION_ANS",
    "mlm": None,
}
LENGTH, PADDED, NEW = 9, 4, 5
CHECKPOINTING_FAMILIES = [
    family for family in FAMILIES if family != "albert"
]  # not supported by transformers


def describe_base(spec: Any, model: Any, head: str) -> Base:
    """Return the description of `model` for a method."""
    has_new_head = head in ("seqcls", "tokcls", "qa")
    return Base(
        config=model.config,
        architecture=model_kind(model.config),
        task_type=TASK_TYPES[head],
        targets=METHODS[spec.kind].default_target_modules(spec, model),
        heads=get_heads(model) if has_new_head else [],
        fan_in_fan_out=False,
        total_steps=2,
    )


def adapt(spec: Any, family: str, head: str, model: Any = None) -> Any:
    """Return a tiny model with the adapter of `spec`, in eval mode."""
    model = build(family, head) if model is None else model
    return apply_method(model, spec, describe_base(spec, model, head)).eval()


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


def check_training_and_reload(
    spec: Any, prefix: str, family: str, head: str, directory: Path
) -> None:
    """Train, disable, finalize, save and load `spec`, and check padding of a row."""
    inputs = build_batch(family, head)
    before = compute_logits(build(family, head), inputs)
    model = adapt(spec, family, head)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(f".{prefix}" in n or ".modules_to_save.default." in n for n in trainable)
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
    model.save_pretrained(str(directory), save_embedding_layers=False)
    other_head = build(family, head, seed=0)
    for name in get_heads(other_head) if head in ("seqcls", "tokcls", "qa") else []:
        for parameter in other_head.get_submodule(name).parameters():
            torch.nn.init.normal_(parameter)  # must be replaced by the saved head
    loaded = load_adapter(other_head, directory)
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


def check_generation(model: Any, family: str) -> None:
    """Check that left-padded rows generate the same with and without cache as a greedy loop."""
    ids = build_batch(family, length=LENGTH)["input_ids"][1:]
    rows = [ids, ids[:, PADDED:]]
    batch = torch.cat([ids, torch.cat([torch.zeros_like(ids[:, :PADDED]), ids[:, PADDED:]], 1)])
    mask = torch.ones_like(batch)
    mask[1, :PADDED] = 0
    expected = torch.cat([_generate_greedily(model, row) for row in rows])
    for use_cache in (True, False):
        generated = model.generate(
            input_ids=batch,
            attention_mask=mask,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
        )
        assert torch.equal(generated[:, -NEW:], expected), f"use_cache={use_cache}"


def _generate_greedily(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Return `NEW` greedy tokens after `row` (1, seq), without cache."""
    seq2seq, config = model.config.is_encoder_decoder, model.config
    generated = torch.tensor([[config.decoder_start_token_id]]) if seq2seq else row
    for _ in range(NEW):
        arguments = (
            {"input_ids": row, "decoder_input_ids": generated}
            if seq2seq
            else {"input_ids": generated}
        )
        with torch.no_grad():
            logits = model(**arguments, use_cache=False).logits[:, -1].clone()
        logits[:, config.eos_token_id] = -torch.inf
        generated = torch.cat([generated, logits.argmax(-1, keepdim=True)], dim=1)
    return generated[:, -NEW:]


def check_checkpointing(spec: Any, family: str, head: str) -> None:
    """Check that gradient checkpointing does not change gradients, including dropout."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = adapt(spec, family, head).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        model(**build_batch(family, head), use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
