"""Runs from before prompt versions keep their prompt layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import task_data
from ftlevel.artifacts.cards import load_card
from ftlevel.cli.app import run
from ftlevel.data.encoding.encode import encode_prompt, load_prompt_format
from ftlevel.trained.resolve import resolve_model
from ftlevel.training.plan import resolve

ModelDir = Callable[..., Path]
TRAIN = ["train", "--quiet", "--task", "summarization", "--dtype", "float32", "--batch-size", "4",
         "--map", "document=en", "--map", "summary=de", "--set", "data.gate.leaked=ignore",
         "--no-predict-with-generate", "--save-strategy", "epoch"]  # fmt: skip


@pytest.fixture
def old_run_summary(
    tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Train with prompt version 1, remove the version from its files, and return the summary."""
    monkeypatch.chdir(tmp_path)
    task_data.write(tmp_path / "data", "pair")
    with monkeypatch.context() as patch:
        patch.setattr(resolve, "PROMPT_VERSION", 1)
        assert train("--output-dir", "run", model=tiny_model_dir("gpt2")) == 0
    card = Path("run/adapter/ftlevel.json")
    fields = json.loads(card.read_text())
    assert fields["prompt"].pop("version") == 1
    del fields["prompt"]["separator"]
    card.write_text(json.dumps(fields))
    origin = Path("run/checkpoints/origin.json")
    origin_fields = json.loads(origin.read_text())
    assert origin_fields.pop("data.prompt_version") == 1
    origin.write_text(json.dumps(origin_fields))
    summary: dict[str, Any] = json.loads(Path("run/summary.json").read_text())
    return summary


def train(*arguments: str, model: Path | None = None, epochs: int = 1) -> int:
    base = [] if model is None else ["--model", str(model)]
    return run([*TRAIN, "--dataset", "data", "--epochs", str(epochs), *base, *arguments])


def prompt_version(folder: str) -> int:
    prompt_format = load_prompt_format(load_card(Path(folder)))
    assert prompt_format is not None
    return prompt_format.version


@pytest.mark.slow
def test_run_without_prompt_version_keeps_its_layout(
    old_run_summary: dict[str, Any], tiny_model_dir: ModelDir, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = resolve_model("run", device="cpu").load("cpu")
    assert loaded.ref.prompt_format is not None
    ids = encode_prompt(loaded.tokenizer, loaded.ref.prompt_format, "the name")
    assert loaded.tokenizer.decode(ids).endswith("\n\nSummary: ")
    capsys.readouterr()
    assert run(["evaluate", "run", "--json", "--resamples", "0", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == old_run_summary["metrics"]
    assert run(["merge", "run", "--out", "merged"]) == 0
    assert prompt_version("merged") == 1
    assert train("--output-dir", "on", "--adapter", "run") == 0
    assert prompt_version("on/adapter") == 1
    assert (
        "was trained with another prompt layout than these rows have. The new adapter will "
        "expect the layout of these rows; see ftlevel preview."
    ) not in capsys.readouterr().err
    assert train("--output-dir", "run", "--resume", model=tiny_model_dir("gpt2"), epochs=2) == 0
    assert prompt_version("run/adapter") == 1
    assert train("--output-dir", "new", model=tiny_model_dir("gpt2")) == 0
    assert prompt_version("new/adapter") == 2
    new = json.loads(Path("new/summary.json").read_text())
    assert new["metrics"]["loss"] != old_run_summary["metrics"]["loss"]
