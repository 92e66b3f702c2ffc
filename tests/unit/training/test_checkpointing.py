"""As many blocks are recomputed as the memory asks for, and the step is the same."""

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


def adapted() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    register_fused_layers(config)
    model = get_peft_model(tiny_models.build("llama", num_hidden_layers=BLOCKS), config).train()
    FusedNormGlu(model)
    return model


def run_of(tokens: int, device: str = "cpu", **train: Any) -> Any:
    rows = [Encoded(list(range(5, 69)), [1] * 64, 0)]
    return SimpleNamespace(
        config=TrainConfig(train=train),  # type: ignore[arg-type]
        data=SimpleNamespace(train=rows, max_length=64),
        model=SimpleNamespace(device=device, dtype="float32", pad_id=0, kind="decoder"),
        fast=SimpleNamespace(enabled=True, tokens=tokens),
    )


def train_of(**train: Any) -> TrainerConfig:
    return TrainerConfig(**train)


def held_by(model: Any, tokens: int) -> int:
    """Return the bytes that are alive after the blocks of a forward pass."""
    ids = torch.arange(tokens)[None] % 500 + 5
    with LiveTensors() as live:
        states = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
        found = live.count_bytes()
    del states
    return found


def test_what_is_counted_is_what_is_held() -> None:
    model = adapted()
    found = get_activations(model, get_blocks(model.get_base_model()), run_of(64))
    more = (held_by(model, 256) - held_by(model, 128)) / 128  # per token, embeddings and norm too
    assert len(found.stored) == BLOCKS
    assert found.states == (model.config.hidden_size * 4,) * BLOCKS
    assert sum(found.stored) == pytest.approx(more, rel=0.1)


@pytest.mark.parametrize(("share", "expected"), [(1.1, 0), (0.8, 2), (0.2, BLOCKS)])
def test_blocks_are_recomputed_until_the_rest_fits(
    share: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = adapted(), run_of(256)
    blocks = get_blocks(model.get_base_model())
    found = get_activations(model, blocks, run)
    memory = int(share * 256 * sum(found.stored))
    monkeypatch.setattr(
        checkpointing, "free_memory_bytes", lambda _: memory / checkpointing.MEMORY_RATIO
    )
    monkeypatch.setattr(type(train_of()), "may_recompute", lambda *_: True)
    choices = set_checkpointing(model, run)
    recomputed = [block.gradient_checkpointing for block in blocks]
    assert recomputed == [True] * expected + [False] * (BLOCKS - expected)
    assert [choice.value for choice in choices] == ([f"{expected} of {BLOCKS}"] if expected else [])
    overhead = 8 * 256 * found.states[0]  # the embedding, angles, masks and the last norm
    if expected < BLOCKS:
        assert held_by(model, 256) < memory + overhead


def test_a_step_is_the_same_however_many_are_recomputed() -> None:
    model, losses = adapted(), []
    ids = torch.arange(40)[None] + 5
    for count in (0, 2, BLOCKS):
        blocks = get_blocks(model.get_base_model())
        if count:
            set_checkpointing(model, run_of(64, gradient_checkpointing=True))
            checkpointing.checkpoint_first(blocks, count)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        losses.append((loss.detach(), gradients))
    for loss, gradients in losses[1:]:
        assert torch.equal(loss, losses[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, losses[0][1], strict=True))


def test_auto_is_for_gpus() -> None:
    train = train_of(gradient_checkpointing="auto")
    assert train.gradient_checkpointing is None
    assert train.may_recompute("cuda")
    assert not train.may_recompute("cpu")
    assert set_checkpointing(adapted(), run_of(64)) == []
    off = train_of(gradient_checkpointing=False)
    assert not off.may_recompute("cuda")


def test_offloading_recomputes_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = adapted(), {}
    base = type(model.get_base_model())
    monkeypatch.setattr(base, "activation_checkpointing_enable",
                        lambda _, settings, **more: told.update(settings, **more))  # fmt: skip
    (choice,) = set_checkpointing(model, run_of(64, offload_activations=True))
    assert (choice.value, choice.reason) == (
        "all", "as requested; what they begin with is in the host's memory"
    )  # fmt: skip
    assert told == {"use_reentrant": False, "offload": True}


def test_the_formula() -> None:
    found = Activations(stored=(100.0,) * 8, states=(10.0,) * 8)
    assert found.min_checkpointed_blocks(10, 8000) == 0
    assert found.min_checkpointed_blocks(10, 7999) == 1
    assert found.min_checkpointed_blocks(10, 8000 - 900 * 3) == 3
    assert found.min_checkpointed_blocks(10, 0) == 8
    uneven = Activations(stored=(100.0, 100.0, 20.0), states=(10.0, 10.0, 2.0))
    assert [uneven.min_checkpointed_blocks(1, memory) for memory in (220, 219, 130, 129)] == [
        0,
        1,
        1,
        2,
    ]


def answered(family: str) -> tuple[Any, Any]:
    """Return an encoder–decoder with LoRA, and a run whose rows have half as long answers."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    register_fused_layers(config)
    run = run_of(8 * 64)
    run.model.kind = "encoder-decoder"
    run.data.train = [Encoded(list(range(5, 69)), list(range(5, 37)), 0)]
    return get_peft_model(tiny_models.build(family), config).train(), run


def batch_of(run: Any, rows: int) -> dict[str, Any]:
    return Collator(0)(run.data.train * rows)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_both_stacks_of_an_encoder_decoder_are_counted(family: str) -> None:
    model, run = answered(family)
    stacks = get_stacks(model.get_base_model())
    found = get_activations(model, [block for stack in stacks for block in stack], run)

    def held(rows: int) -> int:
        with LiveTensors() as live:
            outputs = model(**batch_of(run, rows))
            kept = live.count_bytes()
        del outputs
        return kept

    more = (held(4) - held(2)) / (2 * 64)
    # Beside the blocks scores are held twice, and of either stack what its embeddings and its last
    # norm make of a token, dropped and not; and its ids and masks.
    scores = model.config.vocab_size * 4 * 32 / 64
    ends = 4 * (64 + 32) / 64 * model.config.hidden_size * 4
    assert more - 2 * scores - ends - 32 < sum(found.stored) < more
    assert all(part > 0 for part in found.stored)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_auto_recomputes_blocks_of_an_encoder_decoder(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = answered(family)
    blocks = [block for stack in get_stacks(model.get_base_model()) for block in stack]
    found = get_activations(model, blocks, run)
    free = 0.5 * run.fast.tokens * sum(found.stored)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch_of(run, 8)).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    monkeypatch.setattr(
        checkpointing, "free_memory_bytes", lambda _: free / checkpointing.MEMORY_RATIO
    )
    monkeypatch.setattr(type(train_of()), "may_recompute", lambda *_: True)
    (choice,) = set_checkpointing(model, run)
    count = found.min_checkpointed_blocks(run.fast.tokens, int(free))
    assert 0 < count < len(blocks)
    assert choice.value == f"{count} of {len(blocks)}"
    recomputed = [block.gradient_checkpointing for block in blocks]
    assert recomputed == [True] * count + [False] * (len(blocks) - count)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), before, strict=True))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_that_is_out_of_memory_can_recompute(family: str) -> None:
    model, run = answered(family)
    fast = SimpleNamespace(plan=SimpleNamespace(workers=1, is_random=True))
    smaller = StepReducer(SimpleNamespace(model=model, fast=fast))
    assert smaller._can_checkpoint()
    run.config = TrainConfig(train=train_of(gradient_checkpointing=True))
    set_checkpointing(model, run)
    assert not smaller._can_checkpoint()


def of_last_products(model: Any, blocks: list[Any]) -> tuple[dict[str, int], list[torch.Tensor]]:
    """Return linear → how often a step with all `blocks` recomputed took its weight, gradients."""
    taken: dict[str, int] = {}
    inputs = {"input_ids": torch.arange(20)[None] + 5}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    for name, module in (pair for block in blocks[-1:] for pair in block.named_modules()):
        if hasattr(module, "_weight"):
            weight = module._weight

            def take(dtype: Any, name: str = name, weight: Any = weight) -> Any:
                taken[name] = taken.get(name, 0) + 1
                return weight(dtype)

            module._weight = take
    for _ in range(2):
        taken.clear()
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs)[0].float().square().sum().backward()
    return taken, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("family", "targets", "last"),
    [
        ("llama", "all-linear", "mlp.down_proj"),
        ("llama", ["q_proj", "o_proj"], None),  # the block ends with a plain linear
        ("gpt2", "all-linear", "mlp.c_proj"),
        ("gemma3_text", "all-linear", None),  # a norm reads what the linear gives
        ("bert", "all-linear", None),
        ("t5", "all-linear", "layer.2.DenseReluDense.wo"),
        ("opt", "all-linear", "fc2"),
        ("bart", "all-linear", None),
        ("gpt_neox", "all-linear", None),
    ],
)
def test_the_last_product_of_a_block_is_not_computed_again(
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
    _, expected = of_last_products(model, [])
    checkpointing.enable_checkpointing(base)
    taken, found = of_last_products(model, blocks)
    assert taken == {name: 2 if name.endswith(last or "-") else 3 for name in taken}
    assert taken
    assert all(map(torch.equal, found, expected))
