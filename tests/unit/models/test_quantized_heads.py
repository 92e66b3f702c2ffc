"""Tests that heads are never quantized, new or pretrained."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from ftlevel.config import QuantConfig
from ftlevel.models.loading import load_model
from ftlevel.models.module_tree import get_heads
from ftlevel.models.quantization import build_quantization_config
from ftlevel.models.sources import ModelSource
from sampling import sample

CELLS = [(*cell, quant) for cell in tiny_models.FAMILY_HEADS for quant in ("4bit", "8bit")]


@pytest.mark.parametrize(("family", "head", "quant"), sample(CELLS))
def test_heads_are_not_quantized(family, head, quant, tiny_model_dir):
    directory = tiny_model_dir(family, head)
    model, _ = load_model(
        ModelSource(family, "directory", str(directory)),
        tiny_models.build_config(family, head),
        tiny_models.AUTO_CLASSES[head],
        dtype=torch.float32,
        device="cpu",
        quantization=build_quantization_config(QuantConfig(kind=quant), torch.float32, []),
    )
    heads = get_heads(model)
    assert heads
    for name in heads:
        for parameter in model.get_submodule(name).parameters():
            assert parameter.dtype == torch.float32
    quantized = [p for p in model.parameters() if not p.is_floating_point()]
    assert quantized, "and the blocks are quantized"
