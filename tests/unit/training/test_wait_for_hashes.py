"""Tests that the first checkpoint waits for the digests of the run's files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from ftlevel.training import origin
from ftlevel.training.origin import BASE, FileDigests
from ftlevel.training.saving import WaitForHashes


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end", "on_evaluate"])
def test_checkpoint_waits_for_file_digests(
    event: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute_slowly(path: Path) -> str:
        time.sleep(0.2)
        return f"of {path.name}"

    monkeypatch.setattr(origin, "file_fingerprint", compute_slowly)
    (tmp_path / "model.safetensors").write_text("x")
    files = {"model.safetensors": tmp_path / "model.safetensors"}
    digest = FileDigests(BASE, "the base", "base.json", files)
    digest.keep(tmp_path)
    callback, arguments = getattr(WaitForHashes([digest.wait]), event), SimpleNamespace()
    callback(arguments, TrainerState(), TrainerControl(should_save=False))
    assert not (tmp_path / "base.json").exists()
    callback(arguments, TrainerState(), TrainerControl(should_save=True))
    assert json.loads((tmp_path / "base.json").read_text()) == {
        "model.safetensors": "of model.safetensors"
    }
    assert digest.changes(tmp_path) == {}
    (tmp_path / "base.json").write_text("[" * 100_000)
    assert digest.changes(tmp_path) is None
