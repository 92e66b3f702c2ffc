"""Tests that tensors recomputed in the backward pass are correct and not stored meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
from ftlevel.fast.fused_layers import FusedNormGlu
from ftlevel.fast.fused_lora import register_fused_layers
from ftlevel.fast.recompute import Recomputation, recomputation_of, with_recomputation
from live_tensors import LiveTensors


def double(x: torch.Tensor) -> torch.Tensor:
    return with_recomputation(x * 2, lambda saved: saved * 2, x)


def test_modified_tensor_is_not_recomputed():
    tensor = double(torch.ones(3))
    assert recomputation_of(tensor) is not None
    tensor.mul_(2)
    assert recomputation_of(tensor) is None


def test_views_and_copies_are_not_recomputed():
    tensor = double(torch.ones(3, 2))
    assert [
        recomputation_of(other)
        for other in (tensor.view(6), tensor.clone(), tensor[:1], tensor + 0)
    ] == [None] * 4


def test_tensor_is_recomputed_once_for_all_users():
    computed = []

    def compute(value: torch.Tensor) -> torch.Tensor:
        computed.append(value * 2)
        return computed[-1]

    recomputation, saved = Recomputation(compute), torch.ones(3)
    for _ in range(3):
        recomputation.register()
    results = [recomputation.make(saved) for _ in range(3)]
    assert len(computed) == 1
    assert all(result is computed[0] for result in results)
    assert recomputation._cached is None  # freed after the last use
    assert torch.equal(recomputation.make(saved), computed[0])  # a second backward pass
    assert len(computed) == 2


def step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return the gradient, and the bytes that autograd saves besides weights."""
    storages: dict[int, Any] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = model(**batch).logits.square().mean()
    size = sum(storage.nbytes() for storage in storages.values())
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]), size


def build_fused(family: str) -> tuple[Any, Any]:
    """Return a tiny model with fused LoRA layers, and its fused norms and GLUs."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    register_fused_layers(config)
    model = get_peft_model(tiny_models.build(family), config).train()
    return model, FusedNormGlu(model)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_recomputation_saves_memory_with_same_gradients(family, monkeypatch):
    model, fused = build_fused(family)
    batch = tiny_models.build_batch(family, None)
    gradient, size = step(model, batch)
    monkeypatch.setattr("ftlevel.fast.fused_lora.recomputation_of", lambda tensor: None)
    expected, plain_size = step(model, batch)
    assert torch.equal(gradient, expected)
    widths = 2 * model.config.hidden_size + model.config.intermediate_size
    recomputed = model.config.num_hidden_layers * widths * batch["input_ids"].numel() * 4
    # The first norm's input is an embedding, which was not saved before.
    assert recomputed * 0.85 < plain_size - size < recomputed
    fused.remove()


@pytest.mark.parametrize("no_grad_mode", [torch.inference_mode, torch.no_grad])
def test_training_mode_layer_works_without_grad(no_grad_mode):
    inputs = tiny_models.build_batch("llama")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    expected = get_peft_model(tiny_models.build("llama"), config).train()
    model, fused = build_fused("llama")
    for _ in range(2):  # with fused norms and GLUs, and without
        with no_grad_mode():
            torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits)
        fused.remove()


def test_checkpointing_stores_only_block_inputs():
    """Inputs of recomputations are saved through autograd, where checkpointing controls them."""
    model, _ = build_fused("llama")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {name: part.repeat(1, 32) for name, part in tiny_models.build_batch("llama").items()}
    tokens, size = batch["input_ids"].numel(), model.config.hidden_size
    with LiveTensors() as live:
        states = model.get_base_model().model(**batch, use_cache=False).last_hidden_state
    # The input of each block and the last output, and the last norm's float32 input and output;
    # masks and angles are smaller than one hidden state.
    assert live.count_bytes() < (model.config.num_hidden_layers + 4) * tokens * size * 4
    states.square().mean().backward()
