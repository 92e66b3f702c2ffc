"""The bound on a row's length: by hand for one model, and never below what was really held."""

from __future__ import annotations

from pathlib import Path

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
    ("holding", "left", "tokens"),
    [
        (MemorySettings(2, 2), WEIGHTS * 2, 2 * BLOCK * 2),
        (MemorySettings(0.5, 4), WEIGHTS // 2, 2 * BLOCK * 4),
        (MemorySettings(4, 2, trained=True), WEIGHTS * 16, 2 * BLOCK * 2),
        (MemorySettings(2, 2, checkpointing=True), WEIGHTS * 2, (2 * 64 + BLOCK) * 2),
    ],
)
def test_the_formula(holding: MemorySettings, left: int, tokens: int) -> None:
    assert max_length_in_memory(LLAMA, holding, left + 7 * tokens) == 7
    assert max_length_in_memory(LLAMA, holding, left + 7 * tokens - 1) == 6
    assert max_length_in_memory(LLAMA, holding, left) is None, (
        "weights alone: not a matter of length"
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_has_its_sizes(family: str) -> None:
    config = AutoConfig.for_model(family, **CONFIGS[family])
    memory, inner = 10_000_000, HIDDEN if family == "gpt2" else INNER
    found = max_length_in_memory(config, MemorySettings(4, 4), memory)
    assert found is not None
    assert found < memory // (LAYERS * (4 * HIDDEN + 2 * inner) * 4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_training_really_holds_more(family: str) -> None:
    """Bytes that autograd keeps for one more token, against those that the bound counts."""
    model = build(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" in name or "wte" in name)  # all frozen blocks carry grads

    def held(tokens: int) -> int:
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, torch.nn.Parameter):
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(input_ids=torch.ones((1, tokens), dtype=torch.long)).logits
        assert logits.requires_grad
        return sum(seen.values())

    counted = LAYERS * (4 * HIDDEN + 2 * INNER) * 4
    assert (held(40) - held(24)) / 16 > counted


def test_limits_of_a_container(tmp_path: Path) -> None:
    for name, text in (("a", "max"), ("b", "1000"), ("c", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "memory.max").write_text(text)
    assert list(get_memory_limits(tmp_path / name for name in "abcd")) == [1000]
    assert device_memory("cpu") > 2**28
