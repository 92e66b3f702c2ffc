"""Tests of the bound on row length: against a formula and against bytes that autograd saves."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from ftlevel.models.hardware import (
    MemorySettings,
    device_memory,
    get_memory_limits,
    max_length_in_memory,
)
from tiny_models import CONFIGS, HIDDEN, INNER, LAYERS, build

LLAMA = AutoConfig.for_model(
    "llama", vocab_size=1_000, hidden_size=64, intermediate_size=128, num_hidden_layers=2
)
WEIGHTS = 1_000 * 64 + 2 * 2 * 64 * (64 + 128)
BLOCK = 4 * 64 + 2 * 128


@pytest.mark.parametrize(
    ("settings", "weight_bytes", "token_bytes"),
    [
        (MemorySettings(2, 2), WEIGHTS * 2, 2 * BLOCK * 2),
        (MemorySettings(0.5, 4), WEIGHTS // 2, 2 * BLOCK * 4),
        (MemorySettings(4, 2, trained=True), WEIGHTS * 16, 2 * BLOCK * 2),
        (MemorySettings(2, 2, checkpointing=True), WEIGHTS * 2, (2 * 64 + BLOCK) * 2),
    ],
)
def test_max_length_matches_formula(settings, weight_bytes, token_bytes):
    for memory, length in ((7 * token_bytes, 7), (7 * token_bytes - 1, 6), (0, None)):
        assert max_length_in_memory(LLAMA, settings, weight_bytes + memory) == length


@pytest.mark.parametrize("family", CONFIGS)
def test_max_length_is_bounded_for_every_family(family):
    config = AutoConfig.for_model(family, **CONFIGS[family])
    memory, inner = 10_000_000, HIDDEN if family == "gpt2" else INNER
    max_length = max_length_in_memory(config, MemorySettings(4, 4), memory)
    assert max_length is not None
    assert max_length < memory // (LAYERS * (4 * HIDDEN + 2 * inner) * 4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_autograd_saves_more_than_bound_counts(family):
    """Compare bytes that autograd saves per token with the bytes that the bound counts."""
    model = build(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            "embed" in name or "wte" in name
        )  # gradients flow through all frozen blocks

    def get_saved_bytes(tokens: int) -> int:
        storages: dict[int, int] = {}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, torch.nn.Parameter):
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            logits = model(input_ids=torch.ones((1, tokens), dtype=torch.long)).logits
        assert logits.requires_grad
        return sum(storages.values())

    bound = LAYERS * (4 * HIDDEN + 2 * INNER) * 4
    assert (get_saved_bytes(40) - get_saved_bytes(24)) / 16 > bound


def test_container_memory_limits_are_read(tmp_path):
    for name, text in (("a", "max"), ("b", "1000"), ("c", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "memory.max").write_text(text)
    assert list(get_memory_limits(tmp_path / name for name in "abcd")) == [1000]
    assert device_memory("cpu") > 2**28
