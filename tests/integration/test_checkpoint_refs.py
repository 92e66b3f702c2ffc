"""A checkpoint can be used like its run: task, base, rows and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from command_line import Cli
from ftlevel.cli.app import run
from run_files import ModelDir

pytestmark = pytest.mark.slow
TEXTS = [f"the module number {i} of the list is {i * 7}" for i in range(24)]
LABELS = [{"text": text, "label": "odd" if i % 2 else "even"} for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of all runs; `kept` in it is the run that tests share."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def train_run(runs_dir: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: ModelDir) -> Any:
    """Return a function that trains `run` for four steps, or copies the shared run."""
    work_dir = runs_dir / "now"
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir()
    monkeypatch.chdir(work_dir)
    model = str(tiny_model_dir("qwen2"))
    (work_dir / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    (work_dir / "labels.jsonl").write_text("\n".join(map(json.dumps, LABELS)))

    def train(*flags: str, data: str = "texts.jsonl", task: str = "text-generation") -> Path:
        shared_run = runs_dir / "kept"
        if not flags and task == "text-generation" and shared_run.exists():
            shutil.copytree(shared_run, "run")
            return work_dir / "run"
        assert run(["train", "--model", model, "--dataset", data, "--task", task,
                    "--max-steps", "4", "--save-steps", "2", "--learning-rate", "1e-2", "--quiet",
                    "--output-dir", "run", *flags]) == 0  # fmt: skip
        if not flags and task == "text-generation":
            shutil.copytree("run", shared_run)
        return work_dir / "run"

    return train


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
def test_last_checkpoint_has_metrics_of_run(flags: list[str], train_run: Any, cli: Cli) -> None:
    virtual_tokens = {"prefix", "p-tuning"} & {*flags}
    train_run(*flags, *(["--dtype", "float32"] if virtual_tokens else []))
    run_result = cli.json("evaluate", "run", "--resamples", "0", "--json")
    last = cli.json("evaluate", "run/checkpoints/checkpoint-4", "--resamples", "0", "--json")
    for key in ("base", "quantization", "task", "dtype"):
        assert last[key] == run_result[key], key
    # A checkpoint stores the prompt encoder; the final adapter stores the virtual tokens.
    tolerance = 1e-5 if virtual_tokens else 0
    assert last["metrics"]["loss"] == pytest.approx(run_result["metrics"]["loss"], rel=tolerance)
    assert last["data"]["rows"] == run_result["data"]["rows"]  # the run's own
    earlier = cli.json("evaluate", "run/checkpoints/checkpoint-2", "--resamples", "0", "--json")
    assert earlier["metrics"]["loss"] != run_result["metrics"]["loss"]


def test_checkpoint_keeps_task_of_run(train_run: Any, cli: Cli) -> None:
    train_run(data="labels.jsonl", task="text-classification")
    command = ("predict", "--dataset", "labels.jsonl", "--limit", "4", "--quiet", "--output")
    for name, out in (("run", "a.jsonl"), ("run/checkpoints/checkpoint-4", "b.jsonl")):
        cli(command[0], name, *command[1:], out)
    assert Path("a.jsonl").read_text() == Path("b.jsonl").read_text()
    error = cli.fails("evaluate run/checkpoints/checkpoint-4 --task text-generation")
    assert "was trained for text-classification" in error


def test_preference_reference_is_start_of_run(train_run: Any, cli: Cli, runs_dir: Path) -> None:
    work_dir = runs_dir / "now"
    rows = [{"prompt": f"say {i}", "chosen": f"number {i}", "rejected": "no"} for i in range(8)]
    (work_dir / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train_run("--max-steps", "2").rename(work_dir / "supervised")
    assert run(["train", "--adapter", "supervised", "--task", "preference", "--dataset",
                "pairs.jsonl", "--max-steps", "4", "--save-steps", "2", "--learning-rate", "1e-2",
                "--quiet", "--output-dir", "run"]) == 0  # fmt: skip
    run_result, last = (
        cli.json(f"evaluate {name} --dataset pairs.jsonl --resamples 0 --no-base --json")
        for name in ("run", "run/checkpoints/checkpoint-4")
    )
    assert last["metrics"] == run_result["metrics"]
    assert last["metrics"]["ref_logp_chosen"] != last["metrics"]["logp_chosen"]


def test_checkpoint_is_found_from_working_directory(
    train_run: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_directory = train_run()
    run_result = cli.json("evaluate", "run", "--resamples", "0", "--json")
    for directory, name in (
        ("run/checkpoints", "checkpoint-4"),
        ("run/checkpoints/checkpoint-4", "."),
    ):
        monkeypatch.chdir(run_directory.parent / directory)
        result = cli.json("evaluate", name, "--resamples", "0", "--json")
        assert result["metrics"] == run_result["metrics"]
        assert result["data"]["rows"] == run_result["data"]["rows"]


def test_merged_checkpoint_equals_merged_run(train_run: Any, cli: Cli) -> None:
    train_run()
    cli.json("merge", "run", "--out", "whole", "--json")
    merged = cli.json("merge", "run/checkpoints/checkpoint-4", "--out", "last", "--json")
    assert merged["verified"]
    run_weights, checkpoint_weights = (
        load_file(f"{directory}/model.safetensors") for directory in ("whole", "last")
    )
    assert run_weights.keys() == checkpoint_weights.keys()
    assert all(run_weights[name].equal(checkpoint_weights[name]) for name in run_weights)
    cli.json("export run/checkpoints/checkpoint-4 --out last.gguf --no-verify --json")


def test_unfinished_pissa_checkpoint_is_rejected(train_run: Any, cli: Cli) -> None:
    """PEFT would compute another PiSSA initialization from the base, and so another model."""
    train_run("--init", "pissa_niter_4")
    for command in (["evaluate"], ["merge", "--out", "whole"], ["generate", "--prompt", "the"]):
        name = "run/checkpoints/checkpoint-2"
        message = cli.fails(command[0], name, *command[1:])
        assert "began with init_lora_weights='pissa_niter_4'" in message
        assert "ftlevel train --output-dir run --resume" in message


def test_damaged_checkpoint_is_reported_in_one_line(train_run: Any, cli: Cli) -> None:
    checkpoint = train_run() / "checkpoints/checkpoint-2"
    (checkpoint / "ftlevel.json").unlink()  # as 0.1.0 left it
    (checkpoint / "adapter_config.json").write_text('{"peft')
    for command in (["evaluate"], ["merge", "--out", "whole"]):
        message = cli.fails(command[0], checkpoint, *command[1:])
        assert "adapter_config.json" in message
        assert "is a bug in ftlevel" not in message


def test_resume_without_tokenizer_files_gives_same_adapter(train_run: Any, cli: Cli) -> None:
    run_dir = train_run()
    expected = load_file(run_dir / "adapter/adapter_model.safetensors")
    (run_dir / "summary.json").unlink()
    checkpoint = run_dir / "checkpoints/checkpoint-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in [n for n in manifest["files"] if n == "ftlevel.json" or "token" in n]:
        (checkpoint / name).unlink()  # as 0.1.0 left them
        del manifest["files"][name]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    cli("train --output-dir run --resume --quiet")
    resumed = load_file(run_dir / "adapter/adapter_model.safetensors")
    assert all(expected[name].equal(resumed[name]) for name in expected)
