"""What a run says of its base model: for one of the Hub, the commit that was trained on."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from ftlevel.artifacts.fingerprint import base_fingerprint
from ftlevel.models.sources import ModelSource
from ftlevel.training.summary import describe_base

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
    assert describe_base(ModelSource("org/model", "hub", "org/model", revision=wish)) == {
        "name": "org/model",
        "kind": "hub",
        "revision": commit,
        "fingerprint": base_fingerprint(snapshots / commit),
    }


def test_what_was_asked_for_is_recorded_where_the_cache_has_nothing(snapshots: Path) -> None:
    other = describe_base(ModelSource("org/other", "hub", "org/other", revision="v1"))
    assert (other["revision"], other["fingerprint"]) == ("v1", None)


def test_a_directory_has_no_revision(snapshots: Path) -> None:
    folder = snapshots / NEW
    assert describe_base(ModelSource(str(folder), "directory", str(folder)))["revision"] is None
