from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2MoeConfig

from ftlevel.commands.list_targets import (
    describe_family,
    describe_model,
    inspect_model,
    is_model,
    list_targets,
    split_pattern,
)
from ftlevel.errors import ConfigError, InputError
from ftlevel.models.families import FAMILIES
from unit.models.meta_models import build, tiny_config


def save_config(directory: Path, family: str, **settings: Any) -> str:
    tiny_config(family, **settings).save_pretrained(directory)
    return str(directory)


def test_family_report():
    report = list_targets("Llama", 8)
    assert (report.source, report.name, report.kind) == ("family", "llama", "decoder")
    row = report.linears[1]
    assert (row.pattern, row.path) == ("model.layers.{i}.self_attn.k_proj", "self_attn.k_proj")
    assert (row.shape, row.count) == ("hidden -> kv_heads*head_dim", None)
    assert report.heads["text-classification"] == ("score",)
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert report.all_linear == tuple(names.split())
    assert (report.lora.of, report.lora.trainable_parameters) == ("Llama-2-7B", 19_988_480)
    assert report.lora.adapter_bytes == 79_953_920
    assert report.total_parameters is None
    assert describe_family("granite").lora is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mixtral", "albert"])
def test_model_report_matches_family_and_model(family, tmp_path):
    report, table = list_targets(Path(save_config(tmp_path, family)), 4), describe_family(family)
    assert report.source == "model"
    assert json.loads(json.dumps(asdict(report)))["linears"][0]["in_features"] == 64
    targets = [row for row in report.linears if row.all_linear]
    expected = {row.pattern for row in table.linears if not row.only or row.name == "wi"}
    assert {row.pattern for row in targets} == expected
    attention = {(row.pattern, row.attention) for row in table.linears}
    assert {(row.pattern, row.attention) for row in targets} <= attention
    assert report.target_parameters == table.target_parameters
    assert set(report.norms) == set(table.norms)
    task = {"decoder": "text-generation", "encoder": "masked-lm"}.get(report.kind, "summarization")
    assert next(iter(report.heads.values())) == table.heads[task]
    inspected = inspect_model(build(family, task), report.name, 4)
    assert (report.lora, report.total_parameters) == (inspected.lora, inspected.total_parameters)


def test_report_of_unknown_family(tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_experts": 4, "vocab_size": 200}
    config = Qwen2MoeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    config.save_pretrained(tmp_path)
    report = describe_model(str(tmp_path))
    assert report.family == "qwen2_moe"
    assert report.family not in FAMILIES
    rows = {row.name: row for row in report.linears}
    assert rows["q_proj"].attention
    assert rows["q_proj"].default
    assert not rows["shared_expert_gate"].default
    assert report.target_parameters == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert report.attention_only == ()


def test_pooler_is_listed_but_not_a_default_target(tmp_path):
    path = save_config(tmp_path, "bert", architectures=["BertForSequenceClassification"])
    report = describe_model(path)
    (pooler,) = [row for row in report.linears if not row.default]
    name = "bert.pooler.dense"
    assert (pooler.pattern, pooler.block, pooler.path) == (name, "", name)
    assert report.linears[-1] == pooler
    assert report.heads == {"BertForSequenceClassification": ("classifier",)}


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-2-7b-hf", "./model", "model.gguf", "builtin:tiny-llama"]
)
def test_paths_and_hub_names_are_models(name):
    assert is_model(name)


@pytest.mark.parametrize("name", ["llama", "no-such-thing"])
def test_other_names_are_no_models(name):
    assert not is_model(name)


def test_directory_named_like_a_family(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    assert not is_model("bert"), "a directory that is no model does not hide the family"
    save_config(tmp_path / "bert", "bert")
    assert is_model("bert")
    (tmp_path / "mine").mkdir()
    assert is_model("mine")


@pytest.mark.parametrize("describe", [describe_family, describe_model])
def test_rank_below_one_raises(describe):
    with pytest.raises(ConfigError, match=r"^--lora-r 0 is not a rank\. Expected 1 or more"):
        describe("llama", 0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"model_type": "no-such-type"}', "no-such-type"),
        ("{}", "model_type"),
        ("{not json", r"it cannot be read \(config\.json: Expecting property name"),
        ('{"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}', "hidden"),
    ],
)
def test_invalid_configurations_raise(tmp_path, text, problem):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=problem) as error:
        describe_model(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}: ")  # worded as in `train`
    assert "\n" not in str(error.value)


def test_missing_model_raises(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        describe_model(str(tmp_path / "missing"))
    with pytest.raises(InputError, match=r"has no config\.json"):
        describe_model(str(tmp_path))


@pytest.mark.parametrize(
    ("block", "path"),
    [("model.layers.{i}", "mlp.up_proj"), ("encoder.block.{i}", "layer.0.SelfAttention.q"),
     ("a.{i}.b.{j}", "c")],
)  # fmt: skip
def test_split_pattern(block, path):
    assert split_pattern(f"{block}.{path}") == (block, path)
