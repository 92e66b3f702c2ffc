"""What a method makes of weights that are not read yet."""

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

Make = Callable[..., Path]


def adapted(directory: Path, spec: LoraSpec, dtype: torch.dtype, slices: LazyWeights | None) -> Any:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # it is stored in float32
@pytest.mark.parametrize("use_dora", [False, True])
def test_heads_are_read_and_what_cannot_be_computed_is_named(
    tiny_model_dir: Make, use_dora: bool, dtype: torch.dtype
) -> None:
    directory, slices = tiny_model_dir("bert", "seqcls"), LazyWeights()
    spec = LoraSpec(use_dora=use_dora)
    expected = adapted(directory, spec, dtype, None)
    model = adapted(directory, spec, dtype, slices)
    made = find_computed_tensor(model, slices)
    assert ("magnitude" in made) == (use_dora and dtype == torch.bfloat16)
    for (name, one), (_, other) in zip(
        expected.named_parameters(), model.named_parameters(), strict=True
    ):
        if one.requires_grad and (not made or "magnitude" not in name):
            assert one.equal(other), name
    assert any(".query.base_layer.weight" in n for n, p in model.named_parameters()
               if p in slices.weights)  # fmt: skip
