"""Runs, bases and data that were moved, and commands from other directories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.commands.evaluate import evaluate
from ftlevel.config import EvaluateConfig
from run_files import ModelDir

WORDS = ("argument", "parser", "module", "string", "value", "object", "default", "file")


@pytest.fixture(scope="module")
def original(tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of a directory with a model, rows and a run that uses relative paths."""
    folder = tmp_path_factory.mktemp("moved") / "here" / "project"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(tiny_model_dir("llama", chat=True), "base")
        rows = [json.dumps({"prompt": f"the {w}", "completion": f"{w} it is"}) for w in WORDS]
        Path("rows.jsonl").write_text("\n".join(rows))
        options = ["--max-steps", "2", "--save-steps", "1", "--validation-split", "0.25", "--quiet"]
        data = ["--model", "base", "--dataset", "rows.jsonl"]
        assert run(["train", *data, *options, "--output-dir", "run"]) == 0
    return shutil.copytree(folder, folder.parents[1] / "kept")


@pytest.fixture
def project(original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Restore the directory at the path where the run was trained, and change to it."""
    parent = original.with_name("here")
    shutil.rmtree(parent)
    monkeypatch.chdir(shutil.copytree(original, parent / "project"))
    return parent / "project"


def evaluate_loss(name: str, **settings: str) -> float:
    return evaluate(EvaluateConfig(name=name, resamples=0, base=False, **settings)).metrics["loss"]


def weights(directory: Path) -> bytes:
    return (directory / "adapter/adapter_model.safetensors").read_bytes()


def test_commands_work_from_other_directory_and_after_move(
    project: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    before, adapter = evaluate_loss("run"), weights(Path("run"))
    monkeypatch.chdir(project.parent)
    assert evaluate_loss("project/run") == before
    project.rename("elsewhere")
    assert evaluate_loss("elsewhere/run") == before
    cli("generate elsewhere/run --prompt 'the file'")
    cli("merge elsewhere/run --out merged --quiet")
    assert evaluate_loss("merged", dataset="elsewhere/rows.jsonl") > 0
    cli("train elsewhere/run/config.yaml --output-dir new --quiet")
    assert weights(Path("new")) == adapter
    Path("elsewhere/run/adapter/adapter_model.safetensors").unlink()
    cli("train --output-dir elsewhere/run --resume --quiet")
    assert weights(Path("elsewhere/run")) == adapter
    cli("preview elsewhere/run --json")


def test_moved_rl_run_finds_its_adapter_and_reward(
    project: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    Path("rewards.py").write_text(
        "def length(completions, **_): return list(map(len, completions))"
    )
    options = ["--max-completion-length", "4", "--num-generations", "2", "--check-groups", "0"]
    data = ["--adapter", "run", "--dataset", "rows.jsonl", "--validation-split", "0.25"]
    steps = ["--max-steps", "2", "--save-steps", "1", "--quiet", "--output-dir", "rl"]
    reward = ["--reward", "rewards.py:length", "--reward", "length:1-4=0.5"]
    cli("train --task rl", *reward, *options, *data, *steps)
    before = evaluate(EvaluateConfig(name="rl", resamples=0, base=False)).metrics
    adapter = weights(Path("rl"))
    monkeypatch.chdir(project.parent)
    cli("train project/rl/config.yaml --output-dir new --quiet")
    assert weights(Path("new")) == adapter
    shutil.rmtree("project/rl/checkpoints/checkpoint-2")
    project.rename("elsewhere")
    resume = ["train", "--output-dir", "elsewhere/rl", "--resume", "--quiet"]
    cli.fails(*resume)  # a file that was not run at this place
    cli(*resume, "--reward elsewhere/rewards.py:length", *reward[2:])
    assert weights(Path("elsewhere/rl")) == adapter
    after = evaluate(EvaluateConfig(name="elsewhere/rl", resamples=0, base=False))
    assert after.metrics == before


def test_data_that_changed_after_training_is_reported(project: Path, cli: Cli) -> None:
    """Another row moves the split, so that training rows are validation rows."""

    def is_reported() -> bool:
        return "rows.jsonl changed after training" in cli.run("evaluate run --resamples 0").err

    assert not is_reported()
    with Path("rows.jsonl").open("a") as file:
        file.write('\n{"prompt": "the row", "completion": "row it is"}')
    assert is_reported()
    path = Path("run/adapter/ftlevel.json")
    card = json.loads(path.read_text())
    del card["data"]["fingerprint"]  # unknown, as in cards of earlier versions
    path.write_text(json.dumps(card))
    assert not is_reported()


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "run", "--prompt", "the file"],
        ["predict", "run", "--dataset", "rows.jsonl", "--limit", "1"],
        ["evaluate", "run", "--resamples", "0"],
        ["merge", "run", "--out", "merged", "--no-verify"],
        ["train", "--output-dir", "run", "--resume", "--quiet"],
    ],
    ids=lambda command: command[0],
)
def test_moved_base_needs_model_option(
    command: list[str], project: Path, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    Path("base").rename("moved")
    if command[0] == "train":  # as if it had been killed after its first checkpoint
        shutil.rmtree("run/adapter")
        shutil.rmtree("run/checkpoints/checkpoint-2")
        Path("run/summary.json").unlink()
    line = cli.fails(*command).splitlines()[-1]
    assert f"looked for at {project}/base" in line
    assert line.endswith("Pass its path: --model PATH.  [adapters]")
    other_model = str(tiny_model_dir("llama", chat=True, seed=1))
    line = cli.fails(*command, f"--model {other_model}").splitlines()[-1]
    if command[0] == "train":
        assert "model.fingerprint (weights of the base model, --model) was" in line
    else:
        assert f"trained on {project}/base" in line
        assert f"--model {other_model} has other weights" in line
    cli(*command, "--model moved")
    if command[0] == "train":  # the new path is stored
        cli("generate run --prompt 'the file'")


def test_model_option_for_full_model_is_rejected(project: Path, cli: Cli) -> None:
    error = cli.fails("generate base --prompt x --model base")
    assert "names the base of an adapter, and base is a whole model" in error


def test_moved_base_can_be_first_argument(project: Path, cli: Cli) -> None:
    Path("base").rename("moved")
    cli("generate moved --adapter mine=run --prompt 'the file'")


def test_base_model_option_applies_to_both_compared_runs(project: Path) -> None:
    shutil.copytree("run", "other")
    Path("base").rename("moved")
    config = EvaluateConfig(
        name="run", against="other", base_model="moved", resamples=0, base=False
    )
    assert evaluate(config).summary["against"]["rows"]["kl"] == 0


def test_renamed_dataset_keeps_validation_split(project: Path, cli: Cli) -> None:
    before = evaluate(EvaluateConfig(name="run", resamples=0))
    Path("rows.jsonl").rename("moved.jsonl")
    error = cli.fails("evaluate run")
    assert error == (
        f"ftlevel: run: data.dataset is not where it was, and was looked for at "
        f"{project}/rows.jsonl. Pass its path: --dataset PATH.  [adapters]\n"
    )
    after = evaluate(EvaluateConfig(name="run", dataset="moved.jsonl", resamples=0))
    assert after.summary["data"]["split"] == "validation"
    assert after.metrics == before.metrics


def test_overwrite_of_directory_with_base_is_rejected(project: Path, cli: Cli) -> None:
    Path("base").rename("run/base")
    command = ["train", "--model", "run/base", "--dataset", "rows.jsonl", "--max-steps", "1"]
    error = cli.fails(*command, "--output-dir run --overwrite --quiet")
    assert "it contains the base model" in error
    assert Path("run/base/config.json").is_file()


def test_changed_setting_on_resume_is_rejected_before_loading(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ftlevel.training.model.load_model", None)
    assert run(["train", "--output-dir", "run", "--resume", "--quiet", "--lora-r", "4"]) == 2
    assert "not the same run: method.r was 8 and is 4" in capsys.readouterr().err
    shutil.rmtree("run/checkpoints/checkpoint-1")
    shutil.rmtree("run/checkpoints/checkpoint-2")
    assert run(["train", "--output-dir", "run", "--resume", "--quiet"]) == 0, "it is done"


def test_base_with_the_recorded_weights_is_preferred(
    project: Path, tiny_model_dir: ModelDir
) -> None:
    shutil.copytree("run", "other/run")
    shutil.copytree(tiny_model_dir("llama", chat=True, seed=1), "other/base")
    assert evaluate_loss("other/run") == evaluate_loss("run")
