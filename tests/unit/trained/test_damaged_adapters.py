"""Tests that damaged adapters, and adapters of another base, raise a one-line error when loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from ftlevel.errors import InputError
from ftlevel.models import untrusted
from ftlevel.trained.adapt import add_adapter, load_adapter
from ftlevel.trained.resolve import resolve_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_models.build("llama"), config).save_pretrained(str(tmp_path))
    return tmp_path


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(directory / WEIGHTS)
    edit(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:500]), "cannot be read"),
    (lambda d: (d / WEIGHTS).unlink(), "contains no adapter_model.safetensors"),
    (lambda d: edit_config(d, peft_type="LORAA"), "type 'LORAA', which PEFT .* 'LORA'"),
    (lambda d: edit_weights(d, lambda w: w[A][0].__setitem__(0, float("nan"))),
     f"has NaN or infinity in 1 of its tensors: {A}"),
    (lambda d: edit_weights(d, lambda w: w.update({A.replace("q_proj", "o_proj"): w[A].clone()})),
     r"0 weights of the adapter are missing and 1 are unknown, such as .*o_proj"),
]  # fmt: skip


def test_adapter_config_without_type_raises(adapter_dir, tiny_model_dir):
    edit_config(adapter_dir, peft_type=None)
    with pytest.raises(InputError, match="names no peft_type"):
        resolve_model(str(adapter_dir), base=str(tiny_model_dir("llama")), device="cpu")


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_adapter_raises(adapter_dir, damage, message):
    loaded = load_adapter(tiny_models.build("llama"), adapter_dir)
    damage(adapter_dir)
    with pytest.raises(InputError, match=message):
        load_adapter(tiny_models.build("llama"), adapter_dir)
    with pytest.raises(InputError, match=message):
        add_adapter(loaded, adapter_dir, "another")


@pytest.mark.parametrize(
    ("family", "overrides"), [("gpt2", {}), ("llama", {"hidden_size": 128, "head_dim": 32})]
)
def test_adapter_of_other_base_raises(adapter_dir, family, overrides):
    with pytest.raises(InputError, match=f"does not fit its base model, {family}"):
        load_adapter(tiny_models.build(family, **overrides), adapter_dir)


@pytest.mark.parametrize(
    "text", ["null", "3", "[]", "{}", "[" * 100_000, '{"peft_type": ["LORA"]}']
)
def test_malformed_adapter_config_raises(adapter_dir, text):
    (adapter_dir / CONFIG).write_text(text)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        load_adapter(tiny_models.build("llama"), adapter_dir)


def test_slow_target_modules_pattern_raises(adapter_dir, monkeypatch):
    monkeypatch.setattr(untrusted, "_TIMEOUT", 0.2)
    edit_config(adapter_dir, target_modules=r"(\w+\.?)+x")
    with pytest.raises(InputError, match="takes too long to match"):
        load_adapter(tiny_models.build("llama"), adapter_dir)
