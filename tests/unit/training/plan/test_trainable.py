"""Tests of LoRA's parameter count against PEFT's layers."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from ftlevel.config.methods import SPECS
from ftlevel.methods import METHODS, Base
from ftlevel.trained.adapt import apply_method
from ftlevel.training.plan.method import resolve_method_targets

HEADS = {"llama": "causal", "gpt2": "causal", "mixtral": "causal", "t5": "seq2seq", "bert": "mlm"}


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 3, "target_modules": ["q_proj", "c_attn", "q", "query"]},
        {"layers_to_transform": [1], "use_rslora": True},
    ],
)
def test_lora_parameter_count_matches_peft(family, fields):
    names = {"llama": "q_proj", "mixtral": "q_proj", "gpt2": "c_attn", "t5": "q", "bert": "query"}
    if "target_modules" in fields:
        fields = {**fields, "target_modules": [names[family]]}
    spec = SPECS["lora"](**fields)
    with torch.device("meta"):
        meta = tiny_models.build(family, HEADS[family])
    targets = resolve_method_targets(spec, meta, family)
    count = METHODS["lora"].num_parameters(spec, targets.sizes)
    base = Base(meta.config, "decoder", None, targets.modules, [], targets.fan_in_fan_out, 1)
    adapted = apply_method(meta, spec, base)
    assert count == sum(p.numel() for p in adapted.parameters() if p.requires_grad) > 0


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}}]
)
def test_lora_variants_have_no_parameter_count(fields):
    assert METHODS["lora"].num_parameters(SPECS["lora"](**fields), {"q_proj": (64, 64)}) is None
