"""A checkpoint can be used like its run: task, base, rows and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ftlevel.cli.app import run

pytestmark = pytest.mark.slow
TEXTS = [f"the module number {i} of the list is {i * 7}" for i in range(24)]
LABELS = [{"text": text, "label": "odd" if i % 2 else "even"} for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all runs; `kept` has those that tests share."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Callable[..., Path]
) -> Any:
    """Return a function that trains `run` in four steps, or restores it, with flags of its own."""
    tmp_path = folder / "now"
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    monkeypatch.chdir(tmp_path)
    model = str(tiny_model_dir("qwen2"))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, LABELS)))

    def train(*flags: str, data: str = "texts.jsonl", task: str = "text-generation") -> Path:
        kept = folder / "kept"
        if not flags and task == "text-generation" and kept.exists():
            shutil.copytree(kept, "run")
            return tmp_path / "run"
        assert run(["train", "--model", model, "--dataset", data, "--task", task,
                    "--max-steps", "4", "--save-steps", "2", "--learning-rate", "1e-2", "--quiet",
                    "--output-dir", "run", *flags]) == 0  # fmt: skip
        if not flags and task == "text-generation":
            shutil.copytree("run", kept)
        return tmp_path / "run"

    return train


def ask(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*command, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--method", "qlora", "--quant", "4bit"],
        ["--method", "prefix", "--set", "method.prefix_projection=true"],
        ["--method", "adalora"],
        *(
            pytest.param(["--method", name], marks=pytest.mark.sweep)
            for name in ("full", "p-tuning", "adapter")
        ),
    ],
    ids=lambda flags: flags[1] if flags else "lora",
)
def test_the_last_checkpoint_scores_as_the_run(
    flags: list[str], trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    virtual = {"prefix", "p-tuning"} & {*flags}
    trained(*flags, *(["--dtype", "float32"] if virtual else []))
    whole = ask(capsys, "evaluate", "run", "--resamples", "0")
    last = ask(capsys, "evaluate", "run/checkpoints/checkpoint-4", "--resamples", "0")
    for key in ("base", "quantization", "task", "dtype"):
        assert last[key] == whole[key], key
    # A checkpoint stores what computes virtual tokens; the final adapter stores the tokens.
    near = 1e-5 if virtual else 0
    assert last["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=near)
    assert last["data"]["rows"] == whole["data"]["rows"]  # the run's own
    earlier = ask(capsys, "evaluate", "run/checkpoints/checkpoint-2", "--resamples", "0")
    assert earlier["metrics"]["loss"] != whole["metrics"]["loss"]


def test_a_checkpoint_knows_its_task(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trained(data="labels.jsonl", task="text-classification")
    command = ("predict", "--dataset", "labels.jsonl", "--limit", "4", "--quiet", "--output")
    for name, out in (("run", "a.jsonl"), ("run/checkpoints/checkpoint-4", "b.jsonl")):
        assert run([command[0], name, *command[1:], out]) == 0
    assert Path("a.jsonl").read_text() == Path("b.jsonl").read_text()
    capsys.readouterr()
    assert run(["evaluate", "run/checkpoints/checkpoint-4", "--task", "text-generation"]) == 2
    assert "was trained for text-classification" in capsys.readouterr().err


def test_preferences_are_held_against_the_start_of_the_run(
    trained: Any, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    tmp_path = folder / "now"
    rows = [{"prompt": f"say {i}", "chosen": f"number {i}", "rejected": "no"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trained("--max-steps", "2").rename(tmp_path / "supervised")
    assert run(["train", "--adapter", "supervised", "--task", "preference", "--dataset",
                "pairs.jsonl", "--max-steps", "4", "--save-steps", "2", "--learning-rate", "1e-2",
                "--quiet", "--output-dir", "run"]) == 0  # fmt: skip
    whole, last = (
        ask(capsys, "evaluate", name, "--dataset", "pairs.jsonl", "--resamples", "0", "--no-base")
        for name in ("run", "run/checkpoints/checkpoint-4")
    )
    assert last["metrics"] == whole["metrics"]
    assert last["metrics"]["ref_logp_chosen"] != last["metrics"]["logp_chosen"]


def test_a_checkpoint_is_known_from_within(
    trained: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_directory = trained()
    whole = ask(capsys, "evaluate", "run", "--resamples", "0")
    for place, name in (("run/checkpoints", "checkpoint-4"), ("run/checkpoints/checkpoint-4", ".")):
        monkeypatch.chdir(run_directory.parent / place)
        found = ask(capsys, "evaluate", name, "--resamples", "0")
        assert found["metrics"] == whole["metrics"]
        assert found["data"]["rows"] == whole["data"]["rows"]


def test_a_checkpoint_is_merged_as_the_run_is(
    trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trained()
    ask(capsys, "merge", "run", "--out", "whole")
    found = ask(capsys, "merge", "run/checkpoints/checkpoint-4", "--out", "last")
    assert found["verified"]
    one, other = (load_file(f"{place}/model.safetensors") for place in ("whole", "last"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    ask(capsys, "export", "run/checkpoints/checkpoint-4", "--out", "last.gguf", "--no-verify")


def test_a_start_inside_the_base_is_no_adapter_before_the_end(
    trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT would take another start out of the base than the run did, and be another model."""
    trained("--init", "pissa_niter_4")
    for command in (["evaluate"], ["merge", "--out", "whole"], ["generate", "--prompt", "the"]):
        capsys.readouterr()
        name = "run/checkpoints/checkpoint-2"
        assert run([command[0], name, *command[1:]]) == 2
        said = capsys.readouterr().err
        assert "began with init_lora_weights='pissa_niter_4'" in said
        assert "ftlevel train --output-dir run --resume" in said


def test_a_checkpoint_that_is_damaged_is_one_line(
    trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained() / "checkpoints/checkpoint-2"
    (checkpoint / "ftlevel.json").unlink()  # as 0.1.0 left it
    (checkpoint / "adapter_config.json").write_text('{"peft')
    for command in (["evaluate"], ["merge", "--out", "whole"]):
        capsys.readouterr()
        assert run([command[0], str(checkpoint), *command[1:]]) == 2
        said = capsys.readouterr().err
        assert "adapter_config.json" in said
        assert "is a bug in ftlevel" not in said


def test_a_run_goes_on_from_a_checkpoint_that_has_them_and_from_one_that_has_not(
    trained: Any,
) -> None:
    place = trained()
    whole = load_file(place / "adapter/adapter_model.safetensors")
    (place / "summary.json").unlink()
    checkpoint = place / "checkpoints/checkpoint-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in [n for n in manifest["files"] if n == "ftlevel.json" or "token" in n]:
        (checkpoint / name).unlink()  # as 0.1.0 left them
        del manifest["files"][name]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert run(["train", "--output-dir", "run", "--resume", "--quiet"]) == 0
    again = load_file(place / "adapter/adapter_model.safetensors")
    assert all(whole[name].equal(again[name]) for name in whole)
