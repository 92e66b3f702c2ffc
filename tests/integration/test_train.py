"""Complete runs: the built-in trained model and tiny models of each architecture."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml

import task_data
from command_line import Cli
from forked import Forked, run_slowly
from ftlevel.cli.app import run
from run_files import ModelDir, read_json, read_rows, read_summary, train, write_rows
from sampling import sample

SHORT = ["--max-samples", "16", "--set", "data.max_eval_samples=8", "--batch-size", "4"]
TINY_OPTIONS = "--model tiny --dataset tiny.jsonl --validation-split 0.2 --batch-size 4".split()
"""A tiny model and 16 training rows in the working directory."""
WORDS = ("house river stone tree bird fish cloud table horse paper glass iron salt wood wind fire "
         "light water earth metal snow sand leaf root seed").split()  # fmt: skip


def write_tiny_inputs(folder: Path, tiny_model_dir: ModelDir) -> Path:
    """Write the model and the rows of `TINY_OPTIONS` to `folder`."""
    (folder / "tiny").symlink_to(tiny_model_dir("llama", chat=True))
    rows = [
        {
            "prompt": " ".join(WORDS[i % 7 : i % 7 + 2 + i % 5]),
            "completion": " ".join([WORDS[i]] * (1 + i % 5)),
        }
        for i in range(1, 21)
    ]
    write_rows(folder / "tiny.jsonl", rows)
    return folder


@pytest.fixture(autouse=True)
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: ModelDir) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_tiny_inputs(tmp_path, tiny_model_dir)


@pytest.fixture(scope="module")
def two_step_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: ModelDir) -> Path:
    """Return the directory of a two-step run with a checkpoint of each step."""
    folder = write_tiny_inputs(tmp_path_factory.mktemp("two-steps"), tiny_model_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(*TINY_OPTIONS, "--max-steps", "2", "--save-steps", "1")
    return folder / "run"


@pytest.fixture
def run_copy(two_step_run: Path, working_dir: Path) -> Path:
    """Copy the two-step run to `run` in the working directory."""
    return shutil.copytree(two_step_run, working_dir / "run")


def digest(directory: str) -> str:
    path = Path(directory) / "adapter"
    files = sorted(p for p in path.iterdir() if p.suffix == ".safetensors")
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "frozen"),
    [
        (["--method", "lora", "--gradient-checkpointing"], 21),
        (["--set", "method.use_dora=true", "--set", "method.use_rslora=true", "--dtype", "float32",
          "--target-modules", "q_proj,v_proj"], 21),
        (["--method", "qlora", "--quant", "4bit", "--double-quant", "--quant-type", "fp4"], 21),
        (["--method", "qlora", "--quant", "8bit"], 21),
        (["--method", "full"], 0),
        pytest.param(["--method", "lora"], 21, marks=pytest.mark.sweep),
        pytest.param(["--method", "qlora", "--quant", "4bit"], 21, marks=pytest.mark.sweep),
    ],
)  # fmt: skip
def test_run_passes_checks_and_writes_files(arguments: list[str], frozen: int) -> None:
    model = ("--model", "tiny", "--overlong", "drop")
    summary = train(*arguments, *model, *SHORT, "--max-steps", "2", "--learning-rate", "1e-3")
    proof = summary["proof"]
    assert proof["reload_difference"] == 0
    assert proof["adapter_effect"] > 0
    assert proof["idle_tensors"] == 0
    assert proof["frozen_tensors"] == frozen
    assert summary["steps"] == 2
    assert summary["metrics"]["perplexity"] > 1
    files = {p.name for p in Path("run").iterdir()}
    assert files == {".ftlevel.json", "README.md", "adapter", "checkpoints", "config.yaml",
                     "metrics.jsonl", "places.json", "report.html", "summary.json",
                     "validation.jsonl"}  # fmt: skip
    card = read_json("run/adapter/ftlevel.json")
    assert card["base"]["name"] == str(Path("tiny").resolve())
    assert card["prompt"]["kind"] == "chat-template"


def test_readme_command_lowers_validation_loss() -> None:
    """`ftlevel train --method lora`: validation loss falls at every evaluation."""
    eval_options = ["--set", "data.max_eval_samples=40"]  # of 109
    summary = train("--method", "lora", "--eval-on-start", *eval_options)
    records = read_rows("run/metrics.jsonl")
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert len(losses) >= 4
    assert losses == sorted(losses, reverse=True)
    before, after = summary["metrics_before"], summary["metrics"]
    assert after["loss"] < before["loss"] - 1.5
    assert after["token_accuracy"] > before["token_accuracy"] + 0.3
    assert summary["loss_last"] < summary["loss_first"] - 0.2


def test_same_command_or_config_gives_same_adapter() -> None:
    arguments = [*TINY_OPTIONS, "--epochs", "1", "--lora-dropout", "0.1"]
    train(*arguments, out="a")
    train(*arguments, out="b")
    train("a/config.yaml", out="c")
    train(*arguments, "--seed", "43", out="d")
    assert digest("a") == digest("b") == digest("c")
    assert digest("a") != digest("d")


def test_metrics_file_has_documented_fields() -> None:
    train(*TINY_OPTIONS, "--epochs", "1")
    records = read_rows("run/metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert set(steps[0]) >= {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens",
                             "elapsed_s", "train_s", "memory_bytes"}  # fmt: skip
    assert steps[-1]["step"] == 4
    # All 16 rows, counted without padding.
    assert steps[-1]["tokens"] == read_summary()["data"]["tokens"]
    assert any("eval_perplexity" in r for r in records)


def test_gradient_accumulation_gives_same_losses() -> None:
    def losses(batch: str, accumulation: str, out: str) -> list[float]:
        train(*TINY_OPTIONS[:-2], "--epochs", "2", "--dtype", "float32", "--batch-size", batch,
              "--gradient-accumulation-steps", accumulation, "--logging-steps", "1",
              "--learning-rate", "1e-3", out=out)  # fmt: skip
        lines = Path(out, "metrics.jsonl").read_text().splitlines()
        return [r["loss"] for r in map(json.loads, lines) if "loss" in r]

    assert losses("8", "1", "a") == pytest.approx(losses("2", "4", "b"), rel=1e-5)


@pytest.mark.parametrize(
    "family", ["t5", "llama", *(pytest.param(f, marks=pytest.mark.sweep) for f in ("bart", "gpt2"))]
)
def test_summarization_trains_and_generates(
    family: str, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    rows = [{"document": f"the {w} is a long thing of many words", "summary": f"a {w}"}
            for w in "abcdefgh"]  # fmt: skip
    summary = train(
        "--task", "summarization", "--model", str(tiny_model_dir(family)),
        "--dataset", write_rows("rows.jsonl", rows), "--validation-split", "0.25",
        "--epochs", "2", "--learning-rate", "1e-2", "--set", "train.max_new_tokens=4",
    )  # fmt: skip
    assert set(summary["metrics"]) >= {"loss", "perplexity", "rouge1", "rouge2", "rougeL"}
    assert summary["proof"]["reload_difference"] == 0
    answer = cli.json(
        "generate run --prompt 'the b is a long' --compare-base --max-new-tokens 4 --json"
    )["answers"][0]
    assert set(answer) == {"adapter", "prompt", "text", "base", "scores", "tags", "dtype"}


@pytest.mark.parametrize(
    ("family", "quant"),
    sample(
        [
            *product(
                ("bert", "roberta", "distilbert", "gpt2", "llama", "t5", "bart"), ("none", "4bit")
            )
        ]
    ),
)
def test_classification_head_is_saved_and_reloaded(
    family: str, quant: str, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    rows = [{"text": f"{w} {w} x{i}", "label": w} for i in range(6) for w in ("up", "down", "left")]
    summary = train(
        "--task", "text-classification", "--model", str(tiny_model_dir(family)), "--quant", quant,
        "--dataset", write_rows("rows.jsonl", rows), "--validation-split", "0.2",
        "--epochs", "1", "--learning-rate", "1e-2",
    )  # fmt: skip
    assert set(summary["metrics"]) >= {"loss", "accuracy", "f1"}
    assert summary["proof"]["reload_difference"] == 0
    assert summary["data"]["labels"] == ["down", "left", "up"]
    card = read_json("run/adapter/ftlevel.json")
    assert card["heads"]
    answer = cli.json("generate run --prompt 'up up' --json")["answers"][0]
    assert answer["text"] in ("down", "left", "up")
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.usefixtures("capfd")
def test_json_option_prints_one_object(cli: Cli) -> None:
    captured = cli.run("train --json", *TINY_OPTIONS, "--max-steps 1 --output-dir run")
    assert json.loads(captured.out)["steps"] == 1
    assert captured.err == ""


UNUSED = {"sklearn", "sacrebleu", "nltk", "rouge_score", "seqeval", "matplotlib", "langdetect"}
"""Libraries of metrics and plots; text-generation needs none, it is scored by loss."""

LIST_IMPORTS = """
import atexit, pathlib, sys
atexit.register(lambda: pathlib.Path("modules").write_text("\\n".join(sys.modules)))
"""


def test_libraries_print_nothing_and_no_metric_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LIST_IMPORTS)
    paths = (str(tmp_path), os.environ.get("PYTHONPATH"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    command = [sys.executable, "-m", "ftlevel", "train", "--quant", "4bit", *TINY_OPTIONS,
               "--max-steps", "2", "--save-steps", "1"]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = set(Path("modules").read_text().split())
    assert imported & UNUSED == set()
    assert "datasets" in imported, "by Trainer's own module"
    assert process.stderr == ""
    assert "proof" in process.stdout
    for line in process.stdout.splitlines():
        assert line.startswith(("·", "ftlevel", "  ")), line


def test_interrupted_run_resumes_like_uninterrupted_run(tmp_path: Path, cli: Cli) -> None:
    arguments = [*TINY_OPTIONS, "--epochs", "6", "--lora-dropout", "0.1", "--logging-steps", "1"]
    train(*arguments, out="whole")
    command = ["train", *arguments, "--output-dir", "broken"]
    process = Forked(call=(run_slowly, (command,)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = Path("broken/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted after step" in message
    assert "--output-dir broken --resume" in message
    assert not Path("broken/adapter").exists()
    cli.fails("generate broken --prompt x")
    with metrics.open("a") as file:  # as if killed while writing a line
        last = json.loads(metrics.read_text().splitlines()[-1])
        file.write(json.dumps({"step": 24, "loss": 99.0}) + '\n{"step": 24, "lo')
    assert last["step"] < 24
    cli("train --quiet --output-dir broken --resume")
    assert digest("broken") == digest("whole")
    measured = {"elapsed_s", "train_s", "memory_bytes"}
    expected, resumed = ([{k: v for k, v in json.loads(line).items() if k not in measured}
                          for line in Path(out, "metrics.jsonl").read_text().splitlines()]
                         for out in ("whole", "broken"))  # fmt: skip
    assert resumed == expected, "a line a step, each that of the unbroken run"
    seconds = [json.loads(line)["train_s"] for line in metrics.read_text().splitlines()]
    assert seconds == sorted(seconds)
    expected, resumed = (read_summary(out) for out in ("whole", "broken"))
    fields = ("steps", "loss_first", "loss_last", "loss_window", "metrics")
    assert [resumed[name] for name in fields] == [expected[name] for name in fields]


def test_interrupt_during_checks_reports_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ftlevel.training.proof.check_saved", interrupt)
        arguments = [*TINY_OPTIONS, "--max-steps", "2", "--save-steps", "1"]
        assert run(["train", "--quiet", *arguments, "--output-dir", "run"]) == 130
    assert capsys.readouterr().err == (
        "ftlevel: interrupted at once; run/checkpoints/checkpoint-2 is kept. "
        "Resume with: ftlevel train --output-dir run --resume\n"
    )
    assert run(["train", "--quiet", "--output-dir", "run", "--resume"]) == 0
    assert Path("run/summary.json").exists()


def test_resumed_head_keeps_its_learning_rate(
    tiny_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_data.write(Path("data"), "class")
    options = ["--model", str(tiny_model_dir("bert")), "--dataset", "data", "--quiet",
               "--task", "text-classification", "--max-steps", "4", "--save-steps",
               "2"]  # fmt: skip
    assert run(["train", *options, "--output-dir", "whole"]) == 0
    with monkeypatch.context() as patch:  # fails in the third step
        patch.setattr(
            "ftlevel.training.callbacks.Report.on_step_end",
            lambda _, args, state, control, **kwargs: fail_after(2, state.global_step),
        )
        with pytest.raises(RuntimeError, match="power"):
            run(["train", *options, "--output-dir", "cut", "--traceback"])
    assert run(["train", *options, "--output-dir", "cut", "--resume"]) == 0
    state = torch.load("cut/checkpoints/checkpoint-4/optimizer.pt", weights_only=True)
    assert sorted(group["initial_lr"] for group in state["param_groups"]) == [0.001, 0.005, 0.005]
    assert digest("cut") == digest("whole")


def fail_after(steps: int, step: int) -> None:
    if step > steps:
        raise RuntimeError("the power failed")


@pytest.mark.usefixtures("run_copy")
def test_resume_with_changed_setting_is_rejected(cli: Cli) -> None:
    message = cli.fails("train --quiet --output-dir run --resume --lora-r 4")
    assert message == (  # the flag differs from the run's config
        "ftlevel: --resume run: not the same run: method.r was 8 and is 4. Restore it, start a "
        "new run in another --output-dir, or pass --allow-change method.r  [resume]\n"
    )


@pytest.mark.usefixtures("run_copy")
def test_resume_with_changed_thread_count_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    count = torch.get_num_threads()
    assert read_json("run/checkpoints/identity.json")["threads"] == count
    torch.set_num_threads(count + 1)
    try:
        code = run(["train", "--quiet", "--output-dir", "run", "--resume"])
    finally:
        torch.set_num_threads(count)
    assert code == 2
    assert capsys.readouterr().err == (
        f"ftlevel: --resume run: not the same run: threads was {count} and is {count + 1}. "
        f"Restore it (OMP_NUM_THREADS={count}), start a new run in another --output-dir, or pass "
        "--allow-change threads  [resume]\n"
    )


def test_group_by_length_resumes_within_epoch() -> None:
    arguments = [*TINY_OPTIONS, "--max-steps", "7", "--save-steps", "6",  # 4 steps an epoch
                 "--set", "train.train_sampling_strategy=group_by_length"]  # fmt: skip
    train(*arguments)
    expected = digest("run")
    Path("run/adapter/adapter_model.safetensors").unlink()
    train("--resume", out="run")
    assert digest("run") == expected


def test_damaged_checkpoint_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    train(*TINY_OPTIONS, "--max-steps", "3", "--save-steps", "1", out="whole")
    shutil.copytree("whole", "run")
    newest = Path("run/checkpoints/checkpoint-3/optimizer.pt")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    Path("run/adapter/adapter_model.safetensors").unlink()  # otherwise the run is finished
    capsys.readouterr()
    assert run(["train", "--quiet", "--output-dir", "run", "--resume"]) == 0
    assert "checkpoint-3: optimizer.pt has changed" in capsys.readouterr().err
    assert Path("run/checkpoints/rejected-3").is_dir()
    proof = read_summary()["proof"]
    assert proof["gradient_tensors"] == 28, "a resumed run proves its gradients too"
    assert digest("run") == digest("whole")


def test_nonfinite_loss_stops_run_without_saving(
    cli: Cli, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source, model_dir = tiny_model_dir("llama", chat=True), tmp_path / "broken"
    model_dir.mkdir()
    for path in source.iterdir():
        (model_dir / path.name).write_bytes(path.read_bytes())
    weights = load_file(model_dir / "model.safetensors")
    for part in ("gate", "up", "down"):  # finite weights with non-finite products
        weights[f"model.layers.1.mlp.{part}_proj.weight"][:] = 9e9
    weights["model.layers.1.post_attention_layernorm.weight"][:] = 9e9
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    error = cli.fails(
        "train --quiet --model broken", *SHORT, "--overlong drop --output-dir run", code=1
    )
    assert re.search(r"(loss is (nan|inf) at|not finite at) step 1\b", error)
    assert "Training stopped before the weights were updated." in error
    assert not Path("run/adapter").exists()


def test_adapter_on_changed_base_is_rejected(
    cli: Cli, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir("llama", chat=True), base)
    train("--model", "base", *SHORT, "--overlong", "drop", "--max-steps", "1")
    shutil.rmtree(base)
    shutil.copytree(tiny_model_dir("llama", chat=True, seed=1), base)
    assert "has other weights" in cli.fails("generate run --prompt x")


def test_model_with_missing_weights_is_rejected(
    cli: Cli, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir("llama", chat=True), base)
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    error = cli.fails("train --quiet --model base", *SHORT, "--overlong drop")
    assert "lacks 1 weights of its architecture" in error
    assert not Path("runs").exists()


@pytest.mark.slow
def test_gguf_base_trains_and_full_run_is_plain_model(first_blocks_gguf: Path) -> None:
    from transformers import AutoModelForCausalLM

    for method in ("lora", "full"):
        summary = train("--model", str(first_blocks_gguf), "--dataset", "tiny.jsonl",
                        "--validation-split", "0.2", "--max-steps", "1", "--method", method,
                        "--overwrite")  # fmt: skip
        assert summary["model"]["kind"] == "gguf"
        assert summary["proof"]["reload_difference"] == 0
        config = yaml.safe_load(Path("run/config.yaml").read_text())
        assert config["model"]["name_or_path"] == str(first_blocks_gguf)
    model = AutoModelForCausalLM.from_pretrained("run/adapter")
    assert model.config.num_hidden_layers == 4
    assert not hasattr(model.config, "quantization_config")


def test_full_run_config_has_rope_theta() -> None:
    train(*TINY_OPTIONS, "--method", "full", "--max-steps", "1")
    config = read_json("run/adapter/config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
