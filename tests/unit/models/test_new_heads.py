"""Tests of new heads and of base weights stored under another prefix."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

import tiny_models
from ftlevel.models.loading import (
    build_task_model,
    get_new_heads,
    get_new_poolers,
    load_config,
    load_model,
    rename_prefix,
)
from ftlevel.models.module_tree import get_new_language_head
from ftlevel.models.sources import ModelSource, resolve_source

NEW_HEADS = {
    "bert": ["cls.predictions.transform"],
    "roberta": ["lm_head.dense", "lm_head.layer_norm"],
    "distilbert": ["vocab_transform", "vocab_layer_norm"],
    "electra": ["generator_predictions"],
    "albert": ["predictions.LayerNorm", "predictions.dense"],
    "deberta-v2": ["cls.predictions.transform"],
    "modernbert": ["head"],
}


@pytest.mark.parametrize(
    ("family", "saved"),
    [*((family, "SomethingModel") for family in NEW_HEADS), ("electra", "ElectraForPreTraining")],
)
def test_get_new_language_head_of_each_family(family, saved):
    model = tiny_models.build(family, "mlm")
    model.config.architectures = [saved]
    new, heads = get_new_language_head(model)
    assert new == NEW_HEADS[family]
    modules = [module for name in new for module in model.get_submodule(name).modules()]
    assert all(module is not model.get_output_embeddings() for module in modules)
    assert all(any(f"{name}.".startswith(f"{head}.") for head in heads) for name in new)
    model.config.architectures = [type(model).__name__]
    assert get_new_language_head(model) == ([], [])


@pytest.mark.parametrize("online", [False, True])
def test_new_modules_of_hub_model_are_those_its_files_lack(tmp_path, monkeypatch, online):
    """Without network, the files are in the cache; otherwise their headers are read."""
    model = tiny_models.build("bert", "mlm")  # has no pooler
    model.save_pretrained(tmp_path)
    tensors = {name: TensorInfo("F32", [1], (0, 4)) for name in model.state_dict()}
    file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
    headers = SafetensorsRepoMetadata(
        metadata={}, sharded=False, weight_map={}, files_metadata={"model.safetensors": file}
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda *_, **__: headers)
    source = ModelSource("a/b", "hub", "a/b", local_files_only=not online)
    meta = build_task_model(model.config, "AutoModelForSequenceClassification")
    assert get_new_poolers(meta, source) == ["bert.pooler"]
    assert get_new_heads(meta, source, ["bert.encoder", "classifier"]) == ["classifier"]


@pytest.mark.parametrize(
    ("family", "head"),
    [(f, h) for f, h in tiny_models.FAMILY_HEADS if h in ("qa", "tokcls", "seqcls")],
)
def test_base_weights_load_into_task_model(family, head, tmp_path):
    """Question answering classes of Llama and Qwen use another base model prefix."""
    base = tiny_models.build(family)
    base.save_pretrained(tmp_path)
    source = resolve_source(str(tmp_path))
    config = load_config(source)
    auto_class = tiny_models.AUTO_CLASSES[head]
    renamed = rename_prefix(config, auto_class)
    assert bool(renamed) == (head == "qa" and family in ("llama", "qwen2", "qwen3", "qwen3_moe"))
    model, missing = load_model(source, config, auto_class, dtype=torch.float32, device="cpu")
    shape = tuple(base.get_input_embeddings().weight.shape)
    assert torch.equal(
        model.get_input_embeddings().weight[: shape[0]], base.get_input_embeddings().weight
    )
    assert not [name for name in missing if "layer" in name and "norm" not in name.lower()]
    if renamed:  # the saved model loads with transformers alone
        model.save_pretrained(tmp_path / "again")
        reloaded, info = type(model).from_pretrained(tmp_path / "again", output_loading_info=True)
        assert not info["missing_keys"]
        assert_equal(reloaded, model)


def assert_equal(a: torch.nn.Module, b: torch.nn.Module) -> None:
    expected = b.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in a.state_dict().items())
