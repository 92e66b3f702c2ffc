"""Tests of adapters on lazily loaded weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlevel.config.methods import LoraSpec
from ftlevel.methods import Base
from ftlevel.models.loading import load_config, load_model
from ftlevel.models.sources import resolve_source
from ftlevel.models.upstream.shards import LazyWeights
from ftlevel.trained.adapt import apply_method
from ftlevel.training.model import find_computed_tensor
from tiny_models import AUTO_CLASSES

ModelDir = Callable[..., Path]


def build_lora_model(
    directory: Path, spec: LoraSpec, dtype: torch.dtype, slices: LazyWeights | None
) -> Any:
    source = resolve_source(str(directory))
    config = load_config(source)
    model, _ = load_model(
        source, config, AUTO_CLASSES["seqcls"], dtype=dtype, device="cpu", slices=slices
    )
    torch.manual_seed(3)
    targets = [f"bert.encoder.layer.{number}.attention.self.query" for number in range(2)]
    return apply_method(
        model, spec, Base(config, "encoder", "SEQ_CLS", targets, ["classifier"], False, 1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the checkpoint is float32
@pytest.mark.parametrize("use_dora", [False, True])
def test_lazy_model_loads_heads_and_reports_computed_tensors(tiny_model_dir, use_dora, dtype):
    directory, slices = tiny_model_dir("bert", "seqcls"), LazyWeights()
    spec = LoraSpec(use_dora=use_dora)
    expected = build_lora_model(directory, spec, dtype, None)
    model = build_lora_model(directory, spec, dtype, slices)
    computed = find_computed_tensor(model, slices)
    assert ("magnitude" in computed) == (use_dora and dtype == torch.bfloat16)
    for (name, eager), (_, lazy) in zip(
        expected.named_parameters(), model.named_parameters(), strict=True
    ):
        if eager.requires_grad and (not computed or "magnitude" not in name):
            assert eager.equal(lazy), name
    assert any(".query.base_layer.weight" in n for n, p in model.named_parameters()
               if p in slices.weights)  # fmt: skip
