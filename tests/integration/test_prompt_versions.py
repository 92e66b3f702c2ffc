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
def old_run(
    tiny_model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Train a run with prompts of version 1, and take away what says so; return its summary."""
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
    begun = json.loads(origin.read_text())
    assert begun.pop("data.prompt_version") == 1
    origin.write_text(json.dumps(begun))
    summary: dict[str, Any] = json.loads(Path("run/summary.json").read_text())
    return summary


def train(*arguments: str, model: Path | None = None, epochs: int = 1) -> int:
    base = [] if model is None else ["--model", str(model)]
    return run([*TRAIN, "--dataset", "data", "--epochs", str(epochs), *base, *arguments])


def version(folder: str) -> int:
    form = load_prompt_format(load_card(Path(folder)))
    assert form is not None
    return form.version


@pytest.mark.slow
def test_an_old_run_keeps_its_prompts(
    old_run: dict[str, Any], tiny_model_dir: ModelDir, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = resolve_model("run", device="cpu").load("cpu")
    assert trained.ref.prompt_format is not None
    ids = encode_prompt(trained.tokenizer, trained.ref.prompt_format, "the name")
    assert trained.tokenizer.decode(ids).endswith("\n\nSummary: ")
    capsys.readouterr()
    assert run(["evaluate", "run", "--json", "--resamples", "0", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == old_run["metrics"]
    assert run(["merge", "run", "--out", "merged"]) == 0
    assert version("merged") == 1
    assert train("--output-dir", "on", "--adapter", "run") == 0
    assert version("on/adapter") == 1
    assert (
        "was trained with another prompt layout than these rows have. The new adapter will "
        "expect the layout of these rows; see ftlevel preview."
    ) not in capsys.readouterr().err
    assert train("--output-dir", "run", "--resume", model=tiny_model_dir("gpt2"), epochs=2) == 0
    assert version("run/adapter") == 1
    assert train("--output-dir", "new", model=tiny_model_dir("gpt2")) == 0
    assert version("new/adapter") == 2
    new = json.loads(Path("new/summary.json").read_text())
    assert new["metrics"]["loss"] != old_run["metrics"]["loss"]
