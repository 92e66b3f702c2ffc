"""Tests that checkpoints read by model names match `from_pretrained`, for every family."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftlevel.artifacts.checkpoints import certify
from ftlevel.models.loading import build_task_model, load_config, load_model, rename_prefix
from ftlevel.models.sources import resolve_source
from ftlevel.models.upstream import conversions, shards
from ftlevel.weights.checkpoint import (
    get_tensor_info,
    load_header,
    merge_sharded_checkpoint,
    open_checkpoint,
    weight_files,
)
from tiny_models import AUTO_CLASSES, FAMILY_HEADS, HEADS


@pytest.mark.parametrize(("family", "head"), FAMILY_HEADS)
def test_names_and_values_match_loaded_model(family, head, tiny_model_dir):
    # The checkpoint has the family's first head; the model has `head`.
    directory = tiny_model_dir(family, HEADS[family][0])
    source, auto_class = resolve_source(str(directory)), AUTO_CLASSES[head]
    config = load_config(source)
    meta = build_task_model(config, auto_class)
    checkpoint = open_checkpoint(source, meta, rename_prefix(config, auto_class))
    model, missing = load_model(source, config, auto_class, dtype=torch.float32, device="cpu")
    expected = model.state_dict()
    stored_names = {name for name in expected if checkpoint.has_tensor(name)}
    assert {n for n in expected if n not in stored_names} == {n for n in missing if n in expected}
    for name in stored_names:
        assert torch.equal(checkpoint.read(name), expected[name]), name
        assert checkpoint.spec(name) == get_tensor_info(expected[name])


@pytest.mark.parametrize("family", ["llama", "bert", "mixtral", "qwen3_moe", "t5"])
def test_convert_for_saving_restores_checkpoint_names(family, tiny_model_dir):
    directory = tiny_model_dir(family)
    source, auto_class = resolve_source(str(directory)), AUTO_CLASSES[HEADS[family][0]]
    meta = build_task_model(load_config(source), auto_class)
    checkpoint = open_checkpoint(source, meta, {})
    saved = {}
    for name in checkpoint.groups:
        saved.update(conversions.revert(meta, {name: checkpoint.read(name)}))
    stored = {k: v for path in weight_files(directory) for k, v in load_header(path)[0].items()}
    assert set(saved) == set(stored)
    assert all(torch.equal(saved[name], tensor.read()) for name, tensor in stored.items())
    assert checkpoint.unused == []


def test_shards_are_merged_again_after_they_changed(tmp_path, monkeypatch):
    def copy_shard(path: Path, out: Path) -> None:
        shutil.copyfile(path / "shard-0.safetensors", out / "model.safetensors")

    monkeypatch.setattr(shards, "merge_shards", copy_shard)
    for value in (1.0, 2.0):
        save_file({"x": torch.full((2,), value)}, tmp_path / "shard-0.safetensors")
        certify(tmp_path)
        merged = merge_sharded_checkpoint(tmp_path)
        assert merge_sharded_checkpoint(tmp_path) == merged
        assert load_file(merged / "model.safetensors")["x"].tolist() == [value, value]
