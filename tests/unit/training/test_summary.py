"""Tests of summary.json: base model revision, losses and parameter counts."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from ftlevel.artifacts.files import base_fingerprint
from ftlevel.models.sources import ModelSource
from ftlevel.training.plan.run import count_parameters
from ftlevel.training.summary import get_base_values, summarize_losses

OLD_COMMIT, NEW_COMMIT = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the snapshots of org/model in a cache with huggingface_hub's layout."""
    repository = tmp_path / "models--org--model"
    for index, (reference, commit) in enumerate([("v1", OLD_COMMIT), ("main", NEW_COMMIT)]):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        save_file({"a": torch.full((2,), float(index))}, snapshot / "model.safetensors")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots"


@pytest.mark.parametrize(
    ("revision", "commit"),
    [(None, NEW_COMMIT), ("main", NEW_COMMIT), ("v1", OLD_COMMIT), (OLD_COMMIT, OLD_COMMIT)],
)
def test_commit_of_hub_model_is_recorded(snapshots, revision, commit):
    assert get_base_values(ModelSource("org/model", "hub", "org/model", revision=revision)) == {
        "name": "org/model",
        "kind": "hub",
        "revision": commit,
        "fingerprint": base_fingerprint(snapshots / commit),
    }


def test_revision_is_as_requested_if_not_cached_and_none_of_directory(snapshots):
    other = get_base_values(ModelSource("org/other", "hub", "org/other", revision="v1"))
    assert (other["revision"], other["fingerprint"]) == ("v1", None)
    directory = str(snapshots / NEW_COMMIT)
    assert get_base_values(ModelSource(directory, "directory", directory))["revision"] is None


@pytest.mark.parametrize(
    ("count", "window"),
    [(1, 1), (2, 1), (3, 1), (4, 2), (9, 4), (10, 5), (50, 5), (51, 6), (100, 10)],
)
def test_first_and_last_loss_are_window_means(count, window):
    losses = [float(count - index) for index in range(count)]
    summary = summarize_losses(losses)
    assert summary["loss_window"] == window
    assert summary["loss_first"] == sum(losses[:window]) / window
    assert summary["loss_last"] == sum(losses[-window:]) / window
    spread = float(torch.tensor(losses[:window]).std()) if window > 1 else None
    assert summary["loss_first_spread"] == (spread and pytest.approx(spread))
    assert (summary["loss_last_spread"] is None) == (window == 1)


def test_empty_losses_have_no_mean():
    assert summarize_losses([]) == {"loss_first": None, "loss_last": None, "loss_window": 0}


def test_trained_head_is_counted_once():
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 8, "vocab_size": 16, "max_position_embeddings": 8}  # fmt: skip
    model = BertForSequenceClassification(BertConfig(**sizes))
    total = sum(p.numel() for p in model.parameters())
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    adapted = get_peft_model(model, lora)
    added = 2 * (8 + 8)
    head = 8 * 2 + 2
    assert count_parameters(adapted) == (added + head, total + added)
