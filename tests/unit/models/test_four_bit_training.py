"""Tests that an evaluation during training on a 4-bit base leaves the gradients unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from ftlevel.config import QuantConfig
from ftlevel.models import loading
from ftlevel.models.quantization import build_quantization_config
from ftlevel.models.sources import ModelSource


def compute_gradients(directory: Path, *, evaluate: bool) -> dict[str, torch.Tensor]:
    """Return LoRA's gradients of the second step, with or without an evaluation before it."""
    torch.manual_seed(0)
    model: Any = loading.load_model(
        ModelSource("llama", "directory", str(directory)),
        transformers.AutoConfig.from_pretrained(directory),
        "AutoModelForCausalLM",
        dtype=torch.bfloat16,
        device="cpu",
        quantization=build_quantization_config(QuantConfig(kind="4bit"), torch.bfloat16, []),
    )[0]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.arange(3, 35)[None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
            if evaluate:
                model.eval()
                with torch.no_grad():
                    model(input_ids=ids[:, :1])
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def get_differing_names(directory: Path) -> list[str]:
    """Return the tensors whose gradients change if an evaluation comes before the step."""
    left, right = (compute_gradients(directory, evaluate=evaluate) for evaluate in (False, True))
    assert left.keys() == right.keys()
    return [name for name, value in left.items() if not torch.equal(value, right[name])]


def test_evaluation_does_not_change_gradients(tiny_model_dir):
    assert not get_differing_names(tiny_model_dir("llama"))


def cpu_repacks_4bit_weights() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


@pytest.mark.skipif(not cpu_repacks_4bit_weights(), reason="only CPUs with AVX512-BF16 repack")
def test_evaluation_changes_gradients_without_keep_trainable_layout(tiny_model_dir, monkeypatch):
    """Fails when bitsandbytes no longer needs `keep_trainable_layout`."""
    monkeypatch.setattr(loading, "keep_trainable_layout", lambda model: 0)
    assert get_differing_names(tiny_model_dir("llama"))
