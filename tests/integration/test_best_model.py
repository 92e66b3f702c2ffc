"""The best model is saved, for every method and after interruptions.

The learning rate is low and constant. The loss falls with each evaluation, so the best model with
`--greater-is-better` is the first one, which equals the end of a shorter run bit for bit.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import task_data
from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.commands.evaluate import evaluate
from ftlevel.config import EvaluateConfig
from ftlevel.training.callbacks import Report
from ftlevel.training.trainer import FtlevelTrainer
from run_files import ModelDir, read_json, read_summary, read_weights

pytestmark = pytest.mark.usefixtures("work_dir")

SHORT = ["--max-samples", "16", "--set", "data.max_eval_samples=6", "--batch-size", "4",
         "--dtype", "float32", "--overlong", "drop", "--lr-scheduler", "constant"]  # fmt: skip
FIRST_IS_BEST = ["--metric-for-best-model", "loss", "--greater-is-better", "--eval-steps", "2"]


@pytest.fixture
def common(tiny_model_dir: ModelDir) -> list[str]:
    data = task_data.write(Path("data"), "mask")
    return ["--model", str(tiny_model_dir("llama", chat=True)), "--dataset", str(data), *SHORT]


def train(*arguments: str, out: str = "run", code: int = 0) -> dict[str, Any]:
    """Run `ftlevel train` and return its summary."""
    assert run(["train", "--quiet", "--output-dir", out, *arguments]) == code
    path = Path(out, "summary.json")
    return read_json(path) if path.exists() else {}


def checkpoints(out: str) -> set[str]:
    return {path.name for path in Path(out, "checkpoints").iterdir() if path.is_dir()}


def interrupt_run(monkeypatch: pytest.MonkeyPatch, last_step: int, *arguments: str) -> None:
    """Start a run that fails in the step after `last_step`."""

    def fail(_: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > last_step:
            raise RuntimeError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr("ftlevel.training.callbacks.Report.on_step_end", fail)
        with pytest.raises(RuntimeError, match="power"):
            run(["train", "--quiet", *arguments, "--traceback"])


METHODS = {
    "lora": [],
    "dora": ["--dora", "--no-fast"],
    "bias": ["--set", "method.bias=all"],
    "modules-to-save": ["--set", "method.modules_to_save=[embed_tokens]"],
    "full": ["--method", "full"],
    "prefix": ["--method", "prefix"],
    "p-tuning": ["--method", "p-tuning"],
    "bottleneck": ["--method", "adapter"],
    "4-bit": ["--method", "qlora"],
    "pissa": ["--init", "pissa"],
}


SAMPLED_METHODS = ("full", "p-tuning", "pissa")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in SAMPLED_METHODS else pytest.mark.sweep)
        for n in METHODS
    ],
)
def test_best_adapter_matches_run_that_stops_there(common: list[str], name: str) -> None:
    options = [*common, *METHODS[name], "--save-strategy", "no"]
    summary = train(*options, *FIRST_IS_BEST, "--max-steps", "6")
    best = summary["best"]
    assert (best["kept_step"], best["best_step"], best["last_step"]) == (2, 2, 6)
    assert best["best"] == summary["metrics"]["loss"] > summary["metrics_last"]["loss"]
    shorter = train(*options, "--max-steps", "2", out="shorter")
    assert shorter["metrics"]["loss"] == best["best"]
    assert read_weights("run") == read_weights("shorter")
    assert summary["proof"]["reload_difference"] < 1e-6
    assert checkpoints("run") == set(), "nothing could go on from the best model alone"


@pytest.mark.slow
def test_adalora_best_model_keeps_its_ranks(common: list[str]) -> None:
    adalora = ["--method", "adalora", "--set", "method.init_r=4", "--set", "method.target_r=2",
               "--set", "method.tinit=0", "--set", "method.tfinal=2"]  # fmt: skip
    summary = train(*common, *adalora, *FIRST_IS_BEST, "--max-steps", "8")
    best, last = summary["best"], summary["metrics_last"]["loss"]
    assert best["kept_step"] == 2
    config = read_json("run/adapter/adapter_config.json")
    rank_counts = [sum(alive) for alive in config["rank_pattern"].values()]
    assert sum(rank_counts) > 2 * len(rank_counts), "the budget falls to 2 a linear later"
    evaluated = evaluate(EvaluateConfig(name="run")).metrics["loss"]
    assert evaluated == pytest.approx(best["best"], rel=1e-6)
    assert evaluated != pytest.approx(last, rel=1e-6)


def test_best_classifier_keeps_its_head(tiny_model_dir: ModelDir) -> None:
    task_data.write(Path("data"), "class")
    options = ["--model", str(tiny_model_dir("bert")), "--dataset", "data", "--lr-scheduler",
               "constant", "--batch-size", "4", "--dtype", "float32"]  # fmt: skip
    summary = train(*options, *FIRST_IS_BEST, "--max-steps", "6")
    best_step = summary["best"]["kept_step"]
    assert best_step < 6
    train(*options, "--max-steps", str(best_step), out="shorter")
    assert read_weights("run") == read_weights("shorter")


def test_default_best_metric_is_first_task_metric(
    tiny_model_dir: ModelDir, capsys: pytest.CaptureFixture[str]
) -> None:
    task_data.write(Path("data"), "class")
    options = ["--model", str(tiny_model_dir("bert")), "--dataset", "data", "--epochs", "2"]
    assert run(["train", *options, "--output-dir", "run"]) == 0
    output = capsys.readouterr().out
    message = "best model: keeping the checkpoint with the highest eval_accuracy"
    assert f"{message} (the task's first metric" in output
    best = read_summary()["best"]
    assert best["metric"] == "eval_accuracy"
    assert f"best model step {best['kept_step']}" in output
    assert f"Selected model: step {best['kept_step']}" in Path("run/adapter/README.md").read_text()
    assert run(["train", *options, "--output-dir", "once", "--epochs", "1"]) == 0
    assert read_summary("once")["best"] is None, "of one, none is best"
    assert "best model" not in capsys.readouterr().out


@pytest.mark.slow
def test_load_best_model_at_end_can_be_disabled(common: list[str]) -> None:
    options = [*common, "--eval-steps", "2", "--max-steps", "4"]
    train(*options, "--no-load-best-model-at-end")
    train(*common, "--eval-strategy", "no", "--max-steps", "4", out="plain")
    assert read_weights("run") == read_weights("plain")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_first_best", "save_steps"),
    [
        pytest.param(True, "1", id="first-1"),
        pytest.param(True, "3", id="first-3", marks=pytest.mark.sweep),
        pytest.param(False, "1", id="last-1", marks=pytest.mark.sweep),
        pytest.param(False, "3", id="last-3"),
    ],
)
def test_resumed_run_keeps_same_best_model(
    common: list[str], monkeypatch: pytest.MonkeyPatch, save_steps: str, is_first_best: bool
) -> None:
    order = FIRST_IS_BEST if is_first_best else ["--eval-steps", "2"]
    options = [*common, *order, "--max-steps", "7", "--save-steps", save_steps,
               "--save-total-limit", "1", "--lora-dropout", "0.1"]  # fmt: skip
    uninterrupted = train(*options, out="whole")
    interrupt_run(monkeypatch, 5, *options, "--output-dir", "cut")
    remaining = checkpoints("cut")
    assert remaining == ({"checkpoint-5"} if save_steps == "1" else {"checkpoint-3"}) | (
        {"best-2"} if is_first_best else {"best-4"} | ({"best-2"} if save_steps == "3" else set())
    )  # the best model at the time of the checkpoint stays
    resumed = train("--resume", out="cut")
    assert read_weights("cut") == read_weights("whole")
    assert resumed["best"] == uninterrupted["best"]
    assert resumed["metrics"] == uninterrupted["metrics"]
    assert resumed["intervals"] == uninterrupted["intervals"] != {}
    predictions = [Path(out, "validation.jsonl").read_bytes() for out in ("cut", "whole")]
    assert predictions[0] == predictions[1], "those of the best model"
    assert read_json("cut/adapter/ftlevel.json")


@pytest.mark.slow
def test_damaged_best_model_is_ignored(
    common: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*common, *FIRST_IS_BEST, "--max-steps", "8", "--save-steps", "3"]
    interrupt_run(monkeypatch, 4, *options, "--output-dir", "run")
    path = Path("run/checkpoints/best-2/trained.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    summary = train("--resume")
    assert "best-2: trained.safetensors has changed" in capsys.readouterr().err
    assert summary["best"]["kept_step"] == 4


@pytest.mark.slow
def test_early_stopped_run_resumes_only_with_more_patience(common: list[str], cli: Cli) -> None:
    options = [
        *common,
        *FIRST_IS_BEST,
        "--max-steps",
        "20",
        "--early-stopping-patience",
        "2",
    ]
    summary = train(*options, "--save-steps", "6")
    assert summary["steps"] == 6
    assert summary["best"]["stopped_early"]
    assert summary["best"]["kept_step"] == 2
    files = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    output = cli("train --output-dir run --resume")
    assert "run is finished: 6 of 20 steps (it stopped early), so no steps remain." in output
    assert "loading the model" not in output
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == files
    output = " ".join(cli("train --output-dir run --resume --early-stopping-patience 3").split())
    assert "run/checkpoints/checkpoint-6 (step 6 of 20)" in output
    assert "stopped early, after 3 evaluations without a better one" in output
    patient = read_summary()
    assert patient["steps"] == 8
    assert patient["best"]["kept_step"] == 2


@pytest.mark.slow
def test_resume_after_early_stopping_trains_no_further(
    common: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*common, *FIRST_IS_BEST, "--max-steps", "20", "--early-stopping-patience", "2",
               "--save-steps", "1"]  # fmt: skip
    train(*options, out="whole")
    with monkeypatch.context() as patch:
        patch.setattr("ftlevel.training.finish.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(["train", "--quiet", *options, "--output-dir", "cut", "--traceback"])
    summary = train("--resume", out="cut")
    assert summary["steps"] == 6
    assert read_weights("cut") == read_weights("whole")


@pytest.mark.slow
def test_save_strategy_best_keeps_best_checkpoints(common: list[str]) -> None:
    options = [*common, "--eval-steps", "2", "--max-steps", "6", "--save-strategy", "best"]
    train(*options, out="falling")
    assert checkpoints("falling") == {"checkpoint-4", "checkpoint-6", "best-4", "best-6"}
    train(*options, "--metric-for-best-model", "loss", "--greater-is-better")
    assert checkpoints("run") == {"checkpoint-2", "best-2"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--metric-for-best-model", "acuracy"],
         "--metric-for-best-model acuracy: --task text-classification does not report this metric. "
         "Did you mean 'accuracy'? There are: loss, accuracy, f1, mcc."),
        (["--early-stopping-patience", "2", "--max-samples", "8", "--dataset", "data/train.jsonl"],
         "--early-stopping-patience 2 needs validation rows to evaluate, and the data has none, "
         "or all were dropped. Name others by --validation-file, or hold some back: "
         "--validation-split 0.05."),
        (["--early-stopping-patience", "2", "--eval-strategy", "no"],
         "--early-stopping-patience 2 cannot be used with --eval-strategy no: it needs evaluations "
         "during training. Use --eval-strategy epoch or steps."),
        (["--early-stopping-threshold", "0.1"],
         "--early-stopping-threshold 0.1 needs --early-stopping-patience N. Add "
         "--early-stopping-patience N, or drop --early-stopping-threshold."),
        (["--metric-for-best-model", "f1", "--no-load-best-model-at-end"],
         "--metric-for-best-model f1 has no effect with --no-load-best-model-at-end. Drop one of "
         "them."),
    ],
)  # fmt: skip
def test_invalid_best_model_options_are_rejected_before_loading(
    arguments: list[str], expected: str, tiny_model_dir: ModelDir,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    task_data.write(Path("data"), "class")
    options = ["--model", str(tiny_model_dir("bert")), "--task", "text-classification"]
    data = [] if "--dataset" in arguments else ["--dataset", "data"]
    train(*options, *data, *arguments, code=2)
    assert capsys.readouterr().err.startswith(f"ftlevel: {expected}  [")
    assert not Path("run").exists()


@pytest.mark.slow
def test_interrupted_evaluation_is_repeated_on_resume(
    common: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch_options = ["--max-samples", "12", "--epochs", "3", "--save-steps", "3",
                     "--metric-for-best-model", "loss", "--greater-is-better"]  # fmt: skip
    options = [*common, *epoch_options]
    uninterrupted = train(*options, out="whole")
    assert uninterrupted["best"]["kept_step"] == 3
    with monkeypatch.context() as patch:  # the checkpoint is written before the evaluation
        patch.setattr("ftlevel.training.trainer.FtlevelTrainer.evaluate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(["train", "--quiet", *options, "--output-dir", "cut", "--traceback"])
    assert checkpoints("cut") == {"checkpoint-3"}
    resumed = train("--resume", out="cut")
    assert resumed["best"] == uninterrupted["best"]
    assert read_weights("cut") == read_weights("whole")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("SIGINT", 2),
        pytest.param("SIGTERM", 5, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 3, marks=pytest.mark.slow),  # at the end of an epoch
    ],
)
def test_interrupt_within_epoch_does_not_change_best_model(
    common: list[str], monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    options = [*common, "--max-samples", "12", "--epochs", "3", "--lora-dropout", "0.1",
               "--metric-for-best-model", "loss", "--greater-is-better"]  # fmt: skip
    uninterrupted = train(*options, out="whole")
    assert uninterrupted["best"]["kept_step"] == 3
    report_step = Report.on_step_end

    def interrupt(report: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report_step(report, args, state, control, **kwargs)
        if state.global_step == step:
            signal.raise_signal(getattr(signal, name))

    with monkeypatch.context() as patch:
        patch.setattr(Report, "on_step_end", interrupt)
        train(*options, out="cut", code=128 + getattr(signal, name))
    assert checkpoints("cut") >= {f"checkpoint-{step}"}
    resumed = train("--resume", out="cut")
    assert resumed["best"] == uninterrupted["best"]
    assert resumed["metrics"] == uninterrupted["metrics"]
    assert read_weights("cut") == read_weights("whole")


@pytest.mark.slow
def test_sigint_in_last_evaluation_finishes_run(
    common: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    original_evaluate = FtlevelTrainer.evaluate

    def interrupting_evaluate(trainer: Any, *arguments: Any, **settings: Any) -> Any:
        if trainer.state.global_step == 4:
            signal.raise_signal(signal.SIGINT)
        return original_evaluate(trainer, *arguments, **settings)

    monkeypatch.setattr(FtlevelTrainer, "evaluate", interrupting_evaluate)
    summary = train(*common, *FIRST_IS_BEST, "--max-steps", "20", "--early-stopping-patience", "1")
    assert (summary["steps"], summary["best"]["kept_step"]) == (4, 2)
