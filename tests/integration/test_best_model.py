"""The best model is kept, for every method and after interruptions.

A rate that is low makes the loss fall evaluation by evaluation, so that with `--greater-is-better`
the best is the first; a constant rate makes it the last of a shorter run, bit for bit.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import task_data
from ftlevel.cli.app import run
from ftlevel.commands.evaluate import evaluate
from ftlevel.config import EvaluateConfig
from ftlevel.training.trainer import FtlevelTrainer

ModelDir = Callable[..., Path]
SHORT = ["--max-samples", "16", "--set", "data.max_eval_samples=6", "--batch-size", "4",
         "--dtype", "float32", "--overlong", "drop", "--lr-scheduler", "constant"]  # fmt: skip
FIRST = ["--metric-for-best-model", "loss", "--greater-is-better", "--eval-steps", "2"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def chat(tiny_model_dir: ModelDir) -> list[str]:
    return ["--model", str(tiny_model_dir("llama", chat=True)), *SHORT]


def train(*arguments: str, out: str = "run", code: int = 0) -> dict[str, Any]:
    """Run `ftlevel train` and return its summary."""
    assert run(["train", "--quiet", "--output-dir", out, *arguments]) == code
    path = Path(out, "summary.json")
    return json.loads(path.read_text()) if path.exists() else {}


def weights(out: str) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(Path(out, "adapter").glob("*.safetensors")))


def checkpoints(out: str) -> set[str]:
    return {path.name for path in Path(out, "checkpoints").iterdir() if path.is_dir()}


def cut(monkeypatch: pytest.MonkeyPatch, after: int, *arguments: str) -> None:
    """Begin a run that ends in the step `after` the given one, as if the power had failed."""

    def fail(_: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step > after:
            raise RuntimeError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr("ftlevel.training.callbacks.Report.on_step_end", fail)
        with pytest.raises(RuntimeError, match="power"):
            run(["train", "--quiet", *arguments, "--traceback"])


METHODS = {
    "lora": [],
    "dora": ["--dora", "--no-fast"],
    "bias": ["--set", "method.bias=all"],
    "in full": ["--set", "method.modules_to_save=[embed_tokens]"],
    "full": ["--method", "full"],
    "prefix": ["--method", "prefix"],
    "p-tuning": ["--method", "p-tuning"],
    "bottleneck": ["--method", "adapter"],
    "4-bit": ["--method", "qlora"],
    "pissa": ["--init", "pissa"],
}


SAMPLE = ("full", "p-tuning", "pissa")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in SAMPLE else pytest.mark.sweep)
        for n in METHODS
    ],
)
def test_the_adapter_is_that_of_a_run_which_ends_there(chat: list[str], name: str) -> None:
    own = [*chat, *METHODS[name], "--save-strategy", "no"]
    summary = train(*own, *FIRST, "--max-steps", "6")
    best = summary["best"]
    assert (best["kept_step"], best["best_step"], best["last_step"]) == (2, 2, 6)
    assert best["best"] == summary["metrics"]["loss"] > summary["metrics_last"]["loss"]
    shorter = train(*own, "--max-steps", "2", out="shorter")
    assert shorter["metrics"]["loss"] == best["best"]
    assert weights("run") == weights("shorter")
    assert summary["proof"]["reload_difference"] < 1e-6
    assert checkpoints("run") == set(), "nothing could go on from the best model alone"


@pytest.mark.slow
def test_adalora_keeps_the_ranks_of_that_step(chat: list[str]) -> None:
    ranks = ["--method", "adalora", "--set", "method.init_r=4", "--set", "method.target_r=2",
             "--set", "method.tinit=0", "--set", "method.tfinal=2"]  # fmt: skip
    summary = train(*chat, *ranks, *FIRST, "--max-steps", "8")
    best, last = summary["best"], summary["metrics_last"]["loss"]
    assert best["kept_step"] == 2
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    left = [sum(alive) for alive in config["rank_pattern"].values()]
    assert sum(left) > 2 * len(left), "the budget falls to 2 a linear later"
    evaluated = evaluate(EvaluateConfig(name="run")).metrics["loss"]
    assert evaluated == pytest.approx(best["best"], rel=1e-6)
    assert evaluated != pytest.approx(last, rel=1e-6)


def test_a_classifier_keeps_its_head(tiny_model_dir: ModelDir) -> None:
    task_data.write(Path("data"), "class")
    own = ["--model", str(tiny_model_dir("bert")), "--dataset", "data", "--lr-scheduler",
           "constant", "--batch-size", "4", "--dtype", "float32"]  # fmt: skip
    summary = train(*own, *FIRST, "--max-steps", "6")
    kept = summary["best"]["kept_step"]
    assert kept < 6
    train(*own, "--max-steps", str(kept), out="shorter")
    assert weights("run") == weights("shorter")


def test_by_default_a_task_is_kept_by_its_first_metric(
    tiny_model_dir: ModelDir, capsys: pytest.CaptureFixture[str]
) -> None:
    task_data.write(Path("data"), "class")
    own = ["--model", str(tiny_model_dir("bert")), "--dataset", "data", "--epochs", "2"]
    assert run(["train", *own, "--output-dir", "run"]) == 0
    shown = capsys.readouterr().out
    kept = "best model: keeping the checkpoint with the highest eval_accuracy"
    assert f"{kept} (the task's first metric" in shown
    best = json.loads(Path("run/summary.json").read_text())["best"]
    assert best["metric"] == "eval_accuracy"
    assert f"kept step {best['kept_step']}" in shown
    assert f"Selected model: step {best['kept_step']}" in Path("run/adapter/README.md").read_text()
    assert run(["train", *own, "--output-dir", "once", "--epochs", "1"]) == 0
    assert json.loads(Path("once/summary.json").read_text())["best"] is None, "of one, none is best"
    assert "best model" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_last_model_is_kept_on_request(chat: list[str]) -> None:
    own = [*chat, "--eval-steps", "2", "--max-steps", "4"]
    train(*own, "--no-load-best-model-at-end")
    train(*chat, "--eval-strategy", "no", "--max-steps", "4", out="plain")
    assert weights("run") == weights("plain")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "saves"),
    [
        pytest.param(True, "1", id="first-1"),
        pytest.param(True, "3", id="first-3", marks=pytest.mark.sweep),
        pytest.param(False, "1", id="last-1", marks=pytest.mark.sweep),
        pytest.param(False, "3", id="last-3"),
    ],
)
def test_a_run_that_goes_on_keeps_the_same(
    chat: list[str], monkeypatch: pytest.MonkeyPatch, saves: str, first: bool
) -> None:
    order = FIRST if first else ["--eval-steps", "2"]
    own = [*chat, *order, "--max-steps", "7", "--save-steps", saves, "--save-total-limit", "1",
           "--lora-dropout", "0.1"]  # fmt: skip
    whole = train(*own, out="whole")
    cut(monkeypatch, 5, *own, "--output-dir", "cut")
    there = checkpoints("cut")
    assert there == ({"checkpoint-5"} if saves == "1" else {"checkpoint-3"}) | (
        {"best-2"} if first else {"best-4"} | ({"best-2"} if saves == "3" else set())
    )  # the best of the checkpoint's time stays, whatever came after it
    again = train("--resume", out="cut")
    assert weights("cut") == weights("whole")
    assert again["best"] == whole["best"]
    assert again["metrics"] == whole["metrics"]
    assert json.loads(Path("cut/adapter/ftlevel.json").read_text())


@pytest.mark.slow
def test_a_damaged_best_model_is_forgotten(
    chat: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*chat, *FIRST, "--max-steps", "8", "--save-steps", "3"]
    cut(monkeypatch, 4, *own, "--output-dir", "run")
    path = Path("run/checkpoints/best-2/trained.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    summary = train("--resume")
    assert "best-2: trained.safetensors has changed" in capsys.readouterr().err
    assert summary["best"]["kept_step"] == 4


@pytest.mark.slow
def test_early_stopping_and_a_finished_run(
    chat: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*chat, *FIRST, "--max-steps", "20", "--early-stopping-patience", "2"]
    summary = train(*own, "--save-steps", "6")
    assert summary["steps"] == 6
    assert summary["best"]["stopped_early"]
    assert summary["best"]["kept_step"] == 2
    files = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(["train", "--output-dir", "run", "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "run is finished: 6 of 20 steps (it stopped early), so no steps remain." in shown
    assert "loading the model" not in shown
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == files
    assert run(["train", "--output-dir", "run", "--resume", "--early-stopping-patience", "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "run/checkpoints/checkpoint-6 (step 6 of 20)" in shown
    assert "stopped early, after 3 evaluations without a better one" in shown
    patient = json.loads(Path("run/summary.json").read_text())
    assert patient["steps"] == 8
    assert patient["best"]["kept_step"] == 2


@pytest.mark.slow
def test_a_run_that_was_over_is_not_trained_further(
    chat: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [*chat, *FIRST, "--max-steps", "20", "--early-stopping-patience", "2", "--save-steps",
           "1"]  # fmt: skip
    train(*own, out="whole")
    with monkeypatch.context() as patch:
        patch.setattr("ftlevel.training.session.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(["train", "--quiet", *own, "--output-dir", "cut", "--traceback"])
    summary = train("--resume", out="cut")
    assert summary["steps"] == 6
    assert weights("cut") == weights("whole")


@pytest.mark.slow
def test_checkpoints_of_the_best_evaluations(chat: list[str]) -> None:
    own = [*chat, "--eval-steps", "2", "--max-steps", "6", "--save-strategy", "best"]
    train(*own, out="falling")
    assert checkpoints("falling") == {"checkpoint-4", "checkpoint-6", "best-4", "best-6"}
    train(*own, "--metric-for-best-model", "loss", "--greater-is-better")
    assert checkpoints("run") == {"checkpoint-2", "best-2"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--metric-for-best-model", "acuracy"],
         "--metric-for-best-model acuracy: --task text-classification does not report this metric. "
         "Did you mean 'accuracy'? There are: loss, accuracy, f1, mcc."),
        (["--early-stopping-patience", "2", "--max-samples", "8", "--dataset", "data/train.jsonl"],
         "--early-stopping-patience 2 needs validation rows to evaluate, and the data has none. "
         "Name some by --validation-file, or hold some back: --validation-split 0.05."),
        (["--early-stopping-patience", "2", "--eval-strategy", "no"],
         "--early-stopping-patience needs evaluations during training, and --eval-strategy no "
         "turns them off. Use --eval-strategy epoch or steps."),
        (["--early-stopping-threshold", "0.1"],
         "--early-stopping-threshold 0.1 needs --early-stopping-patience N. Add it."),
        (["--metric-for-best-model", "f1", "--no-load-best-model-at-end"],
         "--metric-for-best-model f1 has no effect with --no-load-best-model-at-end. Drop one of "
         "them."),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_before_weights_load(
    arguments: list[str], complaint: str, tiny_model_dir: ModelDir,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    task_data.write(Path("data"), "class")
    own = ["--model", str(tiny_model_dir("bert")), "--task", "text-classification"]
    data = [] if "--dataset" in arguments else ["--dataset", "data"]
    train(*own, *data, *arguments, code=2)
    assert capsys.readouterr().err.startswith(f"ftlevel: {complaint}  [")
    assert not Path("run").exists()


@pytest.mark.slow
def test_an_evaluation_that_was_broken_off_is_made_up_for(
    chat: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    an_epoch = ["--max-samples", "12", "--epochs", "3", "--save-steps", "3",
                "--metric-for-best-model", "loss", "--greater-is-better"]  # fmt: skip
    own = [*chat, *an_epoch]
    whole = train(*own, out="whole")
    assert whole["best"]["kept_step"] == 3
    with monkeypatch.context() as patch:  # its checkpoint is written before the epoch is evaluated
        patch.setattr("ftlevel.training.trainer.FtlevelTrainer.evaluate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(["train", "--quiet", *own, "--output-dir", "cut", "--traceback"])
    assert checkpoints("cut") == {"checkpoint-3"}
    again = train("--resume", out="cut")
    assert again["best"] == whole["best"]
    assert weights("cut") == weights("whole")


@pytest.mark.slow
def test_ctrl_c_in_the_last_evaluation_finds_the_run_at_its_end(
    chat: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    evaluate_there = FtlevelTrainer.evaluate

    def press(trainer: Any, *arguments: Any, **settings: Any) -> Any:
        if trainer.state.global_step == 4:
            signal.raise_signal(signal.SIGINT)
        return evaluate_there(trainer, *arguments, **settings)

    monkeypatch.setattr(FtlevelTrainer, "evaluate", press)
    summary = train(*chat, *FIRST, "--max-steps", "20", "--early-stopping-patience", "1")
    assert (summary["steps"], summary["best"]["kept_step"]) == (4, 2)
