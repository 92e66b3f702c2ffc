"""Model card metadata, parsed with huggingface_hub's `ModelCard`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult

from ftlevel.artifacts.cards import (
    code,
    create_merge_readme,
    create_quantized_readme,
    create_readme,
    plain,
)
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS

# https://github.com/huggingface/huggingface.js/blob/main/packages/tasks/src/pipelines.ts
PIPELINE_TAGS = {
    "fill-mask", "question-answering", "sentence-similarity", "summarization",
    "text-classification", "text-generation", "text-ranking", "token-classification",
    "translation",
}  # fmt: skip
HUB = {"name": "org/base", "kind": "hub", "revision": None}


def summary(**changes: Any) -> dict[str, Any]:
    defaults = {
        "run": "runs/first", "task": "text-classification", "method": "lora", "model": HUB,
        "steps": 3, "metrics": {"accuracy": 0.9, "loss": 0.5}, "metrics_before": {},
        "data": {"name": "org/rows", "train_rows": 9, "validation_rows": 3, "generated_rows": 0,
                 "labels": []},
        "loss_window": 0, "versions": {"ftlevel": "0.2.0"},
    }  # fmt: skip
    return {**defaults, **changes}


def test_names_are_text_in_cards():
    assert plain("<b>[x](y)\n# \x1b") == r"\<b\>\[x\](y)\\n# \\x1b"
    assert (code("a\nb"), code("`"), code("a``b")) == (r"`a\nb`", "`` ` ``", "``` a``b ```")


def test_card_of_run_on_hub_model_and_dataset():
    card = ModelCard(create_readme(summary()))
    expected = {
        "base_model": "org/base", "base_model_relation": "adapter", "datasets": ["org/rows"],
        "library_name": "peft", "tags": ["ftlevel", "lora"], "metrics": ["accuracy", "loss"],
        "model_name": "first",
    }  # fmt: skip
    assert {name: card.data.get(name) for name in expected} == expected
    assert card.data.eval_results[0] == EvalResult(
        task_type="text-classification", dataset_name="org/rows", dataset_type="org/rows",
        dataset_split="validation", metric_type="accuracy", metric_value=0.9,
    )  # fmt: skip
    assert card.content.count("---\n") == 2


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_hub_pipeline_tag_and_a_command_it_supports(task):
    text = create_readme(summary(task=task))
    data = ModelCard(text).data
    assert data.pipeline_tag in PIPELINE_TAGS
    assert data.eval_results[0].task_type == data.pipeline_tag
    command = "generate runs/first --prompt"
    try:
        TASKS[task].create_query("text", "context", 0)
    except InputError:
        command = "predict runs/first --dataset FILE"
    assert f"\nftlevel {command}" in text


def test_local_names_are_omitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/rows").mkdir(parents=True)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    local = {"name": str(tmp_path), "kind": "directory"}
    data = {**summary()["data"], "name": "data/rows"}
    card = ModelCard(create_readme(summary(model=local, data=data, method="full")))
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    for name in ("rows: 'a'.csv", "a.jsonl + b.jsonl"):
        text = create_readme(summary(data={**data, "name": name}))
        assert ModelCard(text).data.eval_results[0].dataset_name == name


def test_license_is_copied_from_base():
    builtin = {"name": "builtin:tiny-llama", "kind": "builtin"}
    data = ModelCard(create_readme(summary(model=builtin))).data
    assert (data.license, data.license_name) == ("other", "psf-2.0")
    assert data.license_link == "https://docs.python.org/3/license.html"
    assert ModelCard(create_readme(summary())).data.license is None  # its card is not on disk


def test_cards_of_merged_and_quantized_models():
    merged = {
        "base": HUB, "out": "out/merged", "adapters": ["runs/first"], "method": "lora",
        "versions": {}, "written": {"dtype": "float32", "untied": False}, "onto": "original",
        "reason": "",
    }  # fmt: skip
    data = ModelCard(create_merge_readme(merged, "rl")).data
    assert (data.base_model, data.pipeline_tag) == ("org/base", "text-generation")
    assert data.tags == ["ftlevel", "merged", "lora"]
    quantized = {
        "source": HUB, "quantization": {"form": "nf4"}, "quantized_linears": 2, "dtype": "float32",
        "versions": {"ftlevel": "0.2.0"}, "parts": {}, "bytes": 1, "bytes_before": 2,
    }  # fmt: skip
    data = ModelCard(create_quantized_readme("small", quantized)).data
    assert (data.base_model, data.get("base_model_relation")) == ("org/base", "quantized")
    assert data.pipeline_tag is None
