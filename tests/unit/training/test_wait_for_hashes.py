"""Tests that the first checkpoint waits for the digests of the run's files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from ftlevel.training import identity
from ftlevel.training.identity import BASE, FileDigests
from ftlevel.training.saving import WaitForHashes


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end", "on_evaluate"])
def test_checkpoint_waits_for_file_digests(event, tmp_path, monkeypatch):
    def compute_slowly(path: Path) -> str:
        time.sleep(0.2)
        return f"of {path.name}"

    monkeypatch.setattr(identity, "file_fingerprint", compute_slowly)
    (tmp_path / "model.safetensors").write_text("x")
    name = f"{BASE} of model.safetensors"
    digest = FileDigests({name: tmp_path / "model.safetensors"}, tmp_path)
    digest.keep()
    callback, arguments = getattr(WaitForHashes([digest.wait]), event), SimpleNamespace()
    callback(arguments, TrainerState(), TrainerControl(should_save=False))
    assert not (tmp_path / "digests.json").exists()
    callback(arguments, TrainerState(), TrainerControl(should_save=True))
    assert json.loads((tmp_path / "digests.json").read_text()) == {name: "of model.safetensors"}
    assert digest.load() == digest.compute()
    (tmp_path / "digests.json").write_text("[" * 100_000)
    assert digest.load() is None
