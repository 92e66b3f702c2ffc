"""Tests that the parameter counts in the table of methods match meta models."""

from __future__ import annotations

import pytest
import torch
import transformers

from ftlevel.config import SPECS
from ftlevel.methods import METHOD_INFO, Base, rows_of
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.method import resolve_method_targets

LAYERS = 32


def build_llama_7b(layers: int):
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def count_parameters(row: str, layers: int) -> int:
    model = build_llama_7b(layers)
    if row == "full":
        return sum(p.numel() for p in model.parameters())
    info = METHOD_INFO[row]
    fields = {name: value for name, value in info.fields.items() if name == "use_dora"}
    spec = SPECS[info.method](**fields)
    targets = resolve_method_targets(spec, model, "llama")
    base = Base(model.config, "decoder", "CAUSAL_LM", targets.modules, [], False, 100)
    model = apply_method(model, spec, base)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


COUNTED_METHODS = [name for name in METHOD_INFO if name != "linear-probe"]


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, marks=pytest.mark.sweep if r == "boft" else []) for r in COUNTED_METHODS],
)
def test_trainable_parameters_of_llama_7b_match_table(row):
    one, two = count_parameters(row, 1), count_parameters(row, 2)  # every layer adds the same
    assert METHOD_INFO[row].llama_7b == one + (LAYERS - 1) * (two - one)


@pytest.mark.parametrize("kind", SPECS)
def test_every_method_has_a_row(kind):
    assert kind in [row.name for row in rows_of(SPECS[kind]())]


@pytest.mark.parametrize(
    ("kind", "fields", "rows"),
    [
        ("lora", {}, ["lora"]),
        ("lora", {"use_dora": True, "init_lora_weights": "pissa_niter_4"},
         ["lora", "dora", "pissa"]),
        ("qlora", {"use_rslora": True, "lora_plus_ratio": 4}, ["qlora", "rslora", "lora+"]),
        ("lora", {"target_parameters": ["mlp.experts.down_proj"]}, ["lora", "experts"]),
        ("oft", {}, ["oft"]),
    ],
)  # fmt: skip
def test_rows_of_a_spec(kind, fields, rows):
    assert [row.name for row in rows_of(SPECS[kind](**fields))] == rows
