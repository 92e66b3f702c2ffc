"""Tests that as many blocks are recomputed as memory requires, without changing the step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
from ftlevel.config import TrainConfig, TrainerConfig
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.fast.fused_layers import FusedNormGlu
from ftlevel.fast.fused_lora import register_fused_layers
from ftlevel.models.module_tree import get_blocks, get_stacks
from ftlevel.training import memory as checkpointing
from ftlevel.training.memory import Activations, StepReducer, get_activations, set_checkpointing
from live_tensors import LiveTensors

BLOCKS = 6


def build_lora_model() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    register_fused_layers(config)
    model = get_peft_model(tiny_models.build("llama", num_hidden_layers=BLOCKS), config).train()
    FusedNormGlu(model)
    return model


def create_run(tokens: int, device: str = "cpu", **train: Any) -> Any:
    rows = [Encoded(list(range(5, 69)), [1] * 64, 0)]
    return SimpleNamespace(
        config=TrainConfig(train=train),  # type: ignore[arg-type]
        data=SimpleNamespace(train=rows, max_length=64),
        model=SimpleNamespace(device=device, dtype="float32", pad_id=0, kind="decoder"),
        fast=SimpleNamespace(enabled=True, tokens=tokens),
    )


def create_trainer_config(**train: Any) -> TrainerConfig:
    return TrainerConfig(**train)


def measure_live_bytes(model: Any, tokens: int) -> int:
    """Return the bytes alive after the blocks of a forward pass."""
    ids = torch.arange(tokens)[None] % 500 + 5
    with LiveTensors() as live:
        states = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
        total = live.count_bytes()
    del states
    return total


def test_counted_activations_match_live_bytes() -> None:
    model = build_lora_model()
    activations = get_activations(model, get_blocks(model.get_base_model()), create_run(64))
    per_token = (
        measure_live_bytes(model, 256) - measure_live_bytes(model, 128)
    ) / 128  # per token, including embeddings and norm
    assert len(activations.stored) == BLOCKS
    assert activations.states == (model.config.hidden_size * 4,) * BLOCKS
    assert sum(activations.stored) == pytest.approx(per_token, rel=0.1)


@pytest.mark.parametrize(("share", "expected"), [(1.1, 0), (0.8, 2), (0.2, BLOCKS)])
def test_blocks_are_recomputed_until_memory_suffices(
    share: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = build_lora_model(), create_run(256)
    blocks = get_blocks(model.get_base_model())
    activations = get_activations(model, blocks, run)
    memory = int(share * 256 * sum(activations.stored))
    monkeypatch.setattr(
        checkpointing, "free_memory_bytes", lambda _: memory / checkpointing.MEMORY_RATIO
    )
    monkeypatch.setattr(type(create_trainer_config()), "may_recompute", lambda *_: True)
    choices = set_checkpointing(model, run)
    recomputed = [block.gradient_checkpointing for block in blocks]
    assert recomputed == [True] * expected + [False] * (BLOCKS - expected)
    assert [choice.value for choice in choices] == ([f"{expected} of {BLOCKS}"] if expected else [])
    overhead = 8 * 256 * activations.states[0]  # the embedding, angles, masks and the last norm
    if expected < BLOCKS:
        assert measure_live_bytes(model, 256) < memory + overhead


def test_step_does_not_depend_on_recomputed_blocks() -> None:
    model, results = build_lora_model(), []
    ids = torch.arange(40)[None] + 5
    for count in (0, 2, BLOCKS):
        blocks = get_blocks(model.get_base_model())
        if count:
            set_checkpointing(model, create_run(64, gradient_checkpointing=True))
            checkpointing.checkpoint_first(blocks, count)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), gradients))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))


def test_auto_checkpointing_applies_to_gpus_only() -> None:
    train = create_trainer_config(gradient_checkpointing="auto")
    assert train.gradient_checkpointing is None
    assert train.may_recompute("cuda")
    assert not train.may_recompute("cpu")
    assert set_checkpointing(build_lora_model(), create_run(64)) == []
    disabled = create_trainer_config(gradient_checkpointing=False)
    assert not disabled.may_recompute("cuda")


def test_offloading_recomputes_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = build_lora_model(), {}
    base = type(model.get_base_model())
    monkeypatch.setattr(base, "activation_checkpointing_enable",
                        lambda _, settings, **more: arguments.update(settings, **more))  # fmt: skip
    (choice,) = set_checkpointing(model, create_run(64, offload_activations=True))
    assert (choice.value, choice.reason) == (
        "all", "as requested; their inputs are in host memory"
    )  # fmt: skip
    assert arguments == {"use_reentrant": False, "offload": True}


def test_min_checkpointed_blocks_matches_formula() -> None:
    even = Activations(stored=(100.0,) * 8, states=(10.0,) * 8)
    assert even.min_checkpointed_blocks(10, 8000) == 0
    assert even.min_checkpointed_blocks(10, 7999) == 1
    assert even.min_checkpointed_blocks(10, 8000 - 900 * 3) == 3
    assert even.min_checkpointed_blocks(10, 0) == 8
    uneven = Activations(stored=(100.0, 100.0, 20.0), states=(10.0, 10.0, 2.0))
    assert [uneven.min_checkpointed_blocks(1, memory) for memory in (220, 219, 130, 129)] == [
        0,
        1,
        1,
        2,
    ]


def build_encoder_decoder(family: str) -> tuple[Any, Any]:
    """Return an encoder-decoder with LoRA, and a run with answers half as long as prompts."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    register_fused_layers(config)
    run = create_run(8 * 64)
    run.model.kind = "encoder-decoder"
    run.data.train = [Encoded(list(range(5, 69)), list(range(5, 37)), 0)]
    return get_peft_model(tiny_models.build(family), config).train(), run


def create_batch(run: Any, rows: int) -> dict[str, Any]:
    return Collator(0)(run.data.train * rows)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_activations_of_both_encoder_decoder_stacks_are_counted(family: str) -> None:
    model, run = build_encoder_decoder(family)
    stacks = get_stacks(model.get_base_model())
    activations = get_activations(model, [block for stack in stacks for block in stack], run)

    def count_live_bytes(rows: int) -> int:
        with LiveTensors() as live:
            outputs = model(**create_batch(run, rows))
            total = live.count_bytes()
        del outputs
        return total

    per_token = (count_live_bytes(4) - count_live_bytes(2)) / (2 * 64)
    # Besides the blocks: logits twice; of each stack the outputs of embeddings and last norm, with
    # and without dropout; ids and masks.
    logits = model.config.vocab_size * 4 * 32 / 64
    other = 4 * (64 + 32) / 64 * model.config.hidden_size * 4
    assert per_token - 2 * logits - other - 32 < sum(activations.stored) < per_token
    assert all(stored > 0 for stored in activations.stored)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_auto_recomputes_blocks_of_an_encoder_decoder(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = build_encoder_decoder(family)
    blocks = [block for stack in get_stacks(model.get_base_model()) for block in stack]
    activations = get_activations(model, blocks, run)
    free = 0.5 * run.fast.tokens * sum(activations.stored)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        model(**create_batch(run, 8)).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    monkeypatch.setattr(
        checkpointing, "free_memory_bytes", lambda _: free / checkpointing.MEMORY_RATIO
    )
    monkeypatch.setattr(type(create_trainer_config()), "may_recompute", lambda *_: True)
    (choice,) = set_checkpointing(model, run)
    count = activations.min_checkpointed_blocks(run.fast.tokens, int(free))
    assert 0 < count < len(blocks)
    assert choice.value == f"{count} of {len(blocks)}"
    recomputed = [block.gradient_checkpointing for block in blocks]
    assert recomputed == [True] * count + [False] * (len(blocks) - count)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), before, strict=True))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoder_can_enable_checkpointing_when_out_of_memory(family: str) -> None:
    model, run = build_encoder_decoder(family)
    fast = SimpleNamespace(plan=SimpleNamespace(workers=1, is_random=True))
    reducer = StepReducer(SimpleNamespace(model=model, fast=fast))
    assert reducer._can_checkpoint()
    run.config = TrainConfig(train=create_trainer_config(gradient_checkpointing=True))
    set_checkpointing(model, run)
    assert not reducer._can_checkpoint()


def count_weight_uses(model: Any, blocks: list[Any]) -> tuple[dict[str, int], list[torch.Tensor]]:
    """Return how often each linear layer's weight was used in a step, and the gradients.

    All `blocks` are recomputed.
    """
    counts: dict[str, int] = {}
    inputs = {"input_ids": torch.arange(20)[None] + 5}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    for name, module in (pair for block in blocks[-1:] for pair in block.named_modules()):
        if hasattr(module, "_weight"):
            weight = module._weight

            def count_use(dtype: Any, name: str = name, weight: Any = weight) -> Any:
                counts[name] = counts.get(name, 0) + 1
                return weight(dtype)

            module._weight = count_use
    for _ in range(2):
        counts.clear()
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs)[0].float().square().sum().backward()
    return counts, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("family", "targets", "last"),
    [
        ("llama", "all-linear", "mlp.down_proj"),
        ("llama", ["q_proj", "o_proj"], None),  # the block ends with a plain linear layer
        ("gpt2", "all-linear", "mlp.c_proj"),
        ("gemma3_text", "all-linear", None),  # a norm follows the linear layer
        ("bert", "all-linear", None),
        ("t5", "all-linear", "layer.2.DenseReluDense.wo"),
        ("opt", "all-linear", "fc2"),
        ("bart", "all-linear", None),
        ("gpt_neox", "all-linear", None),
    ],
)
def test_last_linear_layer_of_block_is_not_recomputed(
    family: str, targets: Any, last: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_, **__: x)
    config = LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    register_fused_layers(config)
    torch.manual_seed(0)
    model = get_peft_model(tiny_models.build(family), config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    base = model.get_base_model()
    blocks = get_stacks(base)[-1]
    _, expected = count_weight_uses(model, [])
    checkpointing.enable_checkpointing(base)
    counts, actual = count_weight_uses(model, blocks)
    assert counts == {name: 2 if name.endswith(last or "-") else 3 for name in counts}
    assert counts
    assert all(map(torch.equal, actual, expected))
