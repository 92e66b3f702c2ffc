"""A checkpoint read by the model's names gives what `from_pretrained` gives, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ftlevel.models.loading import build_task_model, load_config, load_model, rename_prefix
from ftlevel.models.sources import resolve_source
from ftlevel.weights.checkpoint import (
    convert_for_saving,
    get_tensor_info,
    load_header,
    open_checkpoint,
    weight_files,
)
from tiny_models import AUTO_CLASSES, FAMILY_HEADS, HEADS


@pytest.mark.parametrize(("family", "head"), FAMILY_HEADS)
def test_names_and_numbers_are_those_of_the_loaded_model(
    family: str, head: str, tiny_model_dir: Callable[..., Path]
) -> None:
    # The checkpoint has the family's first head; the model has `head`.
    folder = tiny_model_dir(family, HEADS[family][0])
    source, auto_class = resolve_source(str(folder)), AUTO_CLASSES[head]
    config = load_config(source)
    meta = build_task_model(config, auto_class)
    checkpoint = open_checkpoint(source, meta, rename_prefix(config, auto_class))
    model, missing = load_model(source, config, auto_class, dtype=torch.float32, device="cpu")
    expected = model.state_dict()
    held = {name for name in expected if checkpoint.has_tensor(name)}
    assert {n for n in expected if n not in held} == {n for n in missing if n in expected}
    for name in held:
        assert torch.equal(checkpoint.read(name), expected[name]), name
        assert checkpoint.spec(name) == get_tensor_info(expected[name])


@pytest.mark.parametrize("family", ["llama", "bert", "mixtral", "qwen3_moe", "t5"])
def test_names_go_back_to_those_of_the_checkpoint(
    family: str, tiny_model_dir: Callable[..., Path]
) -> None:
    folder = tiny_model_dir(family)
    source, auto_class = resolve_source(str(folder)), AUTO_CLASSES[HEADS[family][0]]
    meta = build_task_model(load_config(source), auto_class)
    checkpoint = open_checkpoint(source, meta, {})
    saved = {}
    for name in checkpoint.groups:
        saved.update(convert_for_saving(meta, name, checkpoint.read(name)))
    stored = {k: v for path in weight_files(folder) for k, v in load_header(path)[0].items()}
    assert set(saved) == set(stored)
    assert all(torch.equal(saved[name], tensor.read()) for name, tensor in stored.items())
    assert checkpoint.unused == []
