"""What a run says of its base model: for one of the Hub, the commit that was trained on."""

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

OLD, NEW = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the snapshots of org/model in a cache as huggingface_hub lays it out."""
    repository = tmp_path / "models--org--model"
    for number, (reference, commit) in enumerate([("v1", OLD), ("main", NEW)]):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        save_file({"a": torch.full((2,), float(number))}, snapshot / "model.safetensors")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots"


@pytest.mark.parametrize(("wish", "commit"), [(None, NEW), ("main", NEW), ("v1", OLD), (OLD, OLD)])
def test_the_commit_of_a_hub_model_is_recorded(
    snapshots: Path, wish: str | None, commit: str
) -> None:
    assert get_base_values(ModelSource("org/model", "hub", "org/model", revision=wish)) == {
        "name": "org/model",
        "kind": "hub",
        "revision": commit,
        "fingerprint": base_fingerprint(snapshots / commit),
    }


def test_what_was_asked_for_is_recorded_where_the_cache_has_nothing(snapshots: Path) -> None:
    other = get_base_values(ModelSource("org/other", "hub", "org/other", revision="v1"))
    assert (other["revision"], other["fingerprint"]) == ("v1", None)


def test_a_directory_has_no_revision(snapshots: Path) -> None:
    folder = snapshots / NEW
    assert get_base_values(ModelSource(str(folder), "directory", str(folder)))["revision"] is None


@pytest.mark.parametrize(
    ("count", "window"),
    [(1, 1), (2, 1), (3, 1), (4, 2), (9, 4), (10, 5), (50, 5), (51, 6), (100, 10)],
)
def test_first_and_last_loss_are_means_of_a_window(count: int, window: int) -> None:
    losses = [float(count - number) for number in range(count)]
    found = summarize_losses(losses)
    assert found["loss_window"] == window
    assert found["loss_first"] == sum(losses[:window]) / window
    assert found["loss_last"] == sum(losses[-window:]) / window
    spread = float(torch.tensor(losses[:window]).std()) if window > 1 else None
    assert found["loss_first_spread"] == (spread and pytest.approx(spread))
    assert (found["loss_last_spread"] is None) == (window == 1)


def test_no_loss_has_no_mean() -> None:
    assert summarize_losses([]) == {"loss_first": None, "loss_last": None, "loss_window": 0}


def test_a_head_that_is_trained_in_full_counts_once() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 8, "vocab_size": 16, "max_position_embeddings": 8}  # fmt: skip
    model = BertForSequenceClassification(BertConfig(**shape))
    whole = sum(p.numel() for p in model.parameters())
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    adapted = get_peft_model(model, lora)
    added = 2 * (8 + 8)
    head = 8 * 2 + 2
    assert count_parameters(adapted) == (added + head, whole + added)
