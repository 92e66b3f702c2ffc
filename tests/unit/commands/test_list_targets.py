from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ftlevel.commands.list_targets import (
    TargetReport,
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


def test_family_report() -> None:
    report = describe_family("Llama", 8)
    assert (report.source, report.name, report.kind) == ("family", "llama", "decoder")
    assert report.linears[1].pattern == "model.layers.{i}.self_attn.k_proj"
    assert report.linears[1].path == "self_attn.k_proj"
    assert report.linears[1].shape == "hidden -> kv_heads*head_dim"
    assert report.linears[1].count is None
    assert report.heads["text-classification"] == ("score",)
    assert report.all_linear == (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    assert report.lora is not None
    assert report.lora.of == "Llama-2-7B"
    assert report.lora.trainable_parameters == 19_988_480
    assert report.lora.adapter_bytes == 79_953_920
    assert report.total_parameters is None


def test_family_report_with_rank_16() -> None:
    lora = describe_family("llama", 16).lora
    assert lora is not None
    assert lora.trainable_parameters == 39_976_960


def test_family_without_example_has_no_lora_size() -> None:
    assert describe_family("granite").lora is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mixtral", "albert"])
def test_model_report_matches_family_and_model(family: str, tmp_path: Path) -> None:
    report = describe_model(save_config(tmp_path, family), 4)
    table = describe_family(family)
    targets = [row for row in report.linears if row.all_linear]
    assert {row.pattern for row in targets} == {
        row.pattern for row in table.linears if not row.only or row.name == "wi"
    }
    assert {(row.pattern, row.attention) for row in targets} <= {
        (row.pattern, row.attention) for row in table.linears
    }
    assert report.target_parameters == table.target_parameters
    assert set(report.norms) == set(table.norms)
    task = {"decoder": "text-generation", "encoder": "masked-lm"}.get(report.kind, "summarization")
    assert next(iter(report.heads.values())) == table.heads[task]
    inspected = inspect_model(build(family, task), report.name, 4)
    assert (report.lora, report.total_parameters) == (inspected.lora, inspected.total_parameters)


def test_report_of_unknown_family(tmp_path: Path) -> None:
    from transformers import Qwen2MoeConfig

    config = Qwen2MoeConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        vocab_size=200,
    )
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


def test_pooler_is_listed_but_not_a_default_target(tmp_path: Path) -> None:
    path = save_config(tmp_path, "bert", architectures=["BertForSequenceClassification"])
    report = describe_model(path)
    (pooler,) = [row for row in report.linears if not row.default]
    assert (pooler.pattern, pooler.block, pooler.path) == (
        "bert.pooler.dense",
        "",
        "bert.pooler.dense",
    )
    assert report.linears[-1] == pooler
    assert report.heads == {"BertForSequenceClassification": ("classifier",)}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_report_is_json(family: str) -> None:
    report = describe_family(family)
    assert json.loads(json.dumps(asdict(report)))["name"] == family


def test_model_report_is_json(tmp_path: Path) -> None:
    report = describe_model(save_config(tmp_path, "llama"))
    assert json.loads(json.dumps(asdict(report)))["linears"][0]["in_features"] == 64


def test_path_is_a_model(tmp_path: Path) -> None:
    save_config(tmp_path, "llama")
    assert list_targets(tmp_path) == describe_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("llama", False),
        ("gpt2", False),
        ("no-such-thing", False),
        ("meta-llama/Llama-2-7b-hf", True),
        ("./model", True),
        ("model.gguf", True),
        ("builtin:tiny-llama", True),
    ],
)
def test_is_model(name: str, model: bool) -> None:
    assert is_model(name) is model


def test_directory_named_like_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    assert not is_model("bert"), "a directory that is no model does not hide the family"
    save_config(tmp_path / "bert", "bert")
    assert is_model("bert")
    (tmp_path / "mine").mkdir()
    assert is_model("mine")


def test_list_targets_source(tmp_path: Path) -> None:
    assert list_targets("llama").source == "family"
    assert list_targets(save_config(tmp_path, "llama")).source == "model"


@pytest.mark.parametrize("describe", [describe_family, describe_model])
def test_rank_below_one_raises(describe: Any) -> None:
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
def test_invalid_configurations_raise(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=problem) as error:
        describe_model(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}: ")  # worded as in `train`
    assert "\n" not in str(error.value)


def test_missing_model_raises(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        describe_model(str(tmp_path / "missing"))
    with pytest.raises(InputError, match=r"has no config\.json"):
        describe_model(str(tmp_path))


def test_builtin_model() -> None:
    report = describe_model("builtin:tiny-llama")
    assert report.family == "llama"
    assert report.lora is not None
    assert report.lora.trainable_parameters > 0


@pytest.mark.parametrize(
    ("pattern", "block", "path"),
    [
        ("model.layers.{i}.mlp.up_proj", "model.layers.{i}", "mlp.up_proj"),
        (
            "encoder.block.{i}.layer.0.SelfAttention.q",
            "encoder.block.{i}",
            "layer.0.SelfAttention.q",
        ),
        ("a.{i}.b.{j}.c", "a.{i}.b.{j}", "c"),
        ("bert.pooler.dense", "", "bert.pooler.dense"),
    ],
)
def test_split_pattern(pattern: str, block: str, path: str) -> None:
    assert split_pattern(pattern) == (block, path)


def test_family_rows_have_block_and_path() -> None:
    for family in FAMILIES:
        report: TargetReport = describe_family(family)
        assert all(row.block and row.path for row in (*report.linears, *report.experts))
