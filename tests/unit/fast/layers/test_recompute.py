"""What the backward pass recomputes is what was there, and is not kept meanwhile."""

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


def doubled(x: torch.Tensor) -> torch.Tensor:
    return with_recomputation(x * 2, lambda kept: kept * 2, x)


def test_a_tensor_that_was_written_to_is_kept() -> None:
    made = doubled(torch.ones(3))
    assert recomputation_of(made) is not None
    made.mul_(2)
    assert recomputation_of(made) is None


def test_views_and_copies_are_kept() -> None:
    made = doubled(torch.ones(3, 2))
    assert [
        recomputation_of(other) for other in (made.view(6), made.clone(), made[:1], made + 0)
    ] == [None] * 4


def test_a_tensor_is_made_once_for_all_that_ask() -> None:
    made = []

    def make(kept: torch.Tensor) -> torch.Tensor:
        made.append(kept * 2)
        return made[-1]

    recomputation, saved = Recomputation(make), torch.ones(3)
    for _ in range(3):
        recomputation.register()
    results = [recomputation.make(saved) for _ in range(3)]
    assert len(made) == 1
    assert all(result is made[0] for result in results)
    assert recomputation._cached is None  # the last one lets it go
    assert torch.equal(recomputation.make(saved), made[0])  # a second backward pass
    assert len(made) == 2


def step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return the gradient, and the bytes that autograd keeps besides weights."""
    kept: dict[int, Any] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).logits.square().mean()
    size = sum(storage.nbytes() for storage in kept.values())
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]), size


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_less_is_kept_and_the_same_is_learned(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    register_fused_layers(config)
    model = get_peft_model(tiny_models.build(family), config).train()
    fused = FusedNormGlu(model)
    batch = tiny_models.build_batch(family, None)
    gradient, size = step(model, batch)
    monkeypatch.setattr("ftlevel.fast.fused_lora.recomputation_of", lambda tensor: None)
    expected, kept = step(model, batch)
    assert torch.equal(gradient, expected)
    widths = 2 * model.config.hidden_size + model.config.intermediate_size
    made_again = model.config.num_hidden_layers * widths * batch["input_ids"].numel() * 4
    # The first norm's input is an embedding, which nobody kept before.
    assert made_again * 0.85 < kept - size < made_again
    fused.remove()


@pytest.mark.parametrize("without", [torch.inference_mode, torch.no_grad])
def test_a_layer_in_training_mode_computes_where_nothing_is_kept(without: Any) -> None:
    inputs = tiny_models.build_batch("llama")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    expected = get_peft_model(tiny_models.build("llama"), config).train()
    register_fused_layers(config)
    torch.manual_seed(0)
    model = get_peft_model(tiny_models.build("llama"), config).train()
    fused = FusedNormGlu(model)
    for _ in range(2):  # with fused norms and GLUs, and without
        with without():
            torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits)
        fused.remove()


def test_checkpointing_keeps_what_blocks_begin_with_and_no_more() -> None:
    """What a recomputation starts from is saved through autograd, where checkpointing sees it."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    register_fused_layers(config)
    model = get_peft_model(tiny_models.build("llama"), config).train()
    model.enable_input_require_grads()
    FusedNormGlu(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {name: part.repeat(1, 32) for name, part in tiny_models.build_batch("llama").items()}
    tokens, size = batch["input_ids"].numel(), model.config.hidden_size
    with LiveTensors() as live:
        states = model.get_base_model().model(**batch, use_cache=False).last_hidden_state
    # What each block begins with and the last one gives, and the last norm's float32 and output;
    # beside them masks and angles, which are no more than one state.
    assert live.count_bytes() < (model.config.num_hidden_layers + 4) * tokens * size * 4
    states.square().mean().backward()
