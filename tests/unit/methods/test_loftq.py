"""Tests of LoftQ initialization: the best low-rank fit of the quantization error."""

from __future__ import annotations

import bitsandbytes as bnb
import peft
import pytest
import torch

import matrix_cells
from ftlevel.methods.lora.initialization import factor, start_from_residual


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_factor_returns_truncated_svd(shape):
    matrix = torch.randn(shape)
    a, b = factor(matrix, 5)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assert (a.shape, b.shape) == ((5, shape[1]), (shape[0], 5))
    torch.testing.assert_close(b @ a, u[:, :5] * s[:5] @ v[:5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_loftq_start_is_optimal_rank_8_correction(family, use_rslora):
    cell = matrix_cells.TinyCell("loftq", family, "causal", ("text-generation",), "4bit")
    config = peft.LoraConfig(r=8, lora_alpha=16, use_rslora=use_rslora, target_modules="all-linear")
    model = peft.get_peft_model(matrix_cells.copy_base(cell), config)
    start_from_residual(model, lambda name: matrix_cells.get_float_weight(cell, name))
    kind = peft.tuners.lora.Linear4bit
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kind)}
    assert layers
    for name, layer in layers.items():
        weight = matrix_cells.get_float_weight(cell, name.removeprefix("base_model.model."))
        packed = layer.get_base_layer().weight
        error = weight - bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        remaining = (error - layer.get_delta_weight("default")).norm()
        optimal = torch.linalg.svdvals(error)[8:].norm()
        torch.testing.assert_close(remaining, optimal, rtol=1e-3, atol=1e-5)
        assert remaining < error.norm()
