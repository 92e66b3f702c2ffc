"""Checkpoints by time, and extended runs.

With a constant learning rate, an extended run equals one that was as long from the start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import task_data
from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.training.trainer import FtlevelTrainer
from run_files import ModelDir, read_rows, read_summary, read_weights, train

pytestmark = pytest.mark.usefixtures("work_dir")

SHORT = ["--max-samples", "12", "--set", "data.max_eval_samples=4", "--batch-size", "4",
         "--dtype", "float32", "--overlong", "drop", "--logging-steps", "1",
         "--lora-dropout", "0.1", "--save-strategy", "epoch"]  # fmt: skip
CONSTANT = ["--lr-scheduler", "constant", "--learning-rate", "1e-3"]


@pytest.fixture
def common(tiny_model_dir: ModelDir) -> list[str]:
    data = task_data.write(Path("data"), "mask")
    return ["--model", str(tiny_model_dir("llama", chat=True)), "--dataset", str(data), *SHORT]


def learning_rates(out: str) -> dict[int, float]:
    records = read_rows(Path(out, "metrics.jsonl"))
    return {r["step"]: r["learning_rate"] for r in records if "learning_rate" in r}


@pytest.mark.slow
def test_extended_run_matches_long_run(common: list[str]) -> None:
    train(*common, *CONSTANT, "--epochs", "4", out="long")
    train(*common, *CONSTANT, "--epochs", "2")
    summary = train("--resume", "--num-train-epochs", "4")
    assert (summary["steps"], summary["planned_steps"]) == (12, 12)
    assert read_weights("run") == read_weights("long")
    assert "num_train_epochs: 4" in Path("run/config.yaml").read_text()
    best, expected = (read_summary(out)["best"]
                      for out in ("run", "long"))  # fmt: skip
    assert best == expected
    before = read_weights("run")
    train("--resume")
    assert read_weights("run") == before, "it is finished at its new length"


@pytest.mark.slow
def test_extended_run_uses_schedule_of_new_length(
    common: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = [*common, "--learning-rate", "1e-3"]
    train(*linear, "--max-steps", "3")
    assert learning_rates("run")[3] == pytest.approx(1e-3 / 3)

    def fail(_: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 4:
            raise RuntimeError("the power failed")

    with monkeypatch.context() as patch:  # interrupted before a checkpoint has the new length
        patch.setattr("ftlevel.training.callbacks.Report.on_step_end", fail)
        with pytest.raises(RuntimeError, match="power"):
            run(["train", "--output-dir", "run", "--resume", "--max-steps", "6", "--traceback"])
    summary = train("--resume")
    assert summary["steps"] == 6
    expected = {step: 1e-3 * (7 - step) / 6 for step in (4, 5, 6)}
    assert {step: learning_rates("run")[step] for step in expected} == pytest.approx(expected)


@pytest.mark.slow
def test_resume_with_plateau_scheduler(
    common: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The missed evaluation reaches the scheduler; a changed rate scales the reduced one."""
    options = [*common[: common.index("--save-strategy")], "--lr-scheduler",
               "reduce_lr_on_plateau", "--lr-scheduler-kwargs", "factor=0.5,patience=0,threshold=1",
               "--learning-rate", "1e-3", "--epochs", "3", "--save-steps", "3"]  # fmt: skip
    train(*options, out="whole")
    evaluate = FtlevelTrainer.evaluate

    def fail(trainer: FtlevelTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        if trainer.state.global_step == 6:
            raise RuntimeError("the power failed")
        return evaluate(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FtlevelTrainer, "evaluate", fail)
        with pytest.raises(RuntimeError, match="power"):
            run(["train", "--output-dir", "run", *options, "--traceback"])
    train("--resume")
    rates = learning_rates("whole")
    assert [rates[step] for step in (3, 6, 9)] == [1e-3, 5e-4, 2.5e-4]
    assert learning_rates("run") == rates
    assert read_weights("run") == read_weights("whole")

    change = ["--learning-rate", "4e-3", "--allow-change", "train.learning_rate"]
    train("--resume", "--num-train-epochs", "4", *change)
    assert "train.learning_rate is 0.004 from here on, was 0.001" in capsys.readouterr().err
    assert learning_rates("run")[10] == 4e-3 / 8


@pytest.mark.slow
def test_invalid_extension_is_rejected(common: list[str], cli: Cli) -> None:
    train(*common, "--max-steps", "3")
    for options, message in (
        (["--max-steps", "2"], "2 steps are fewer than the 3 already trained"),
        (["--num-train-epochs", "9"], "--num-train-epochs 9 has no effect: --max-steps 3 sets"),
        (["--max-steps", "9", "--lora-r", "2"], "not the same run: method.r was 8 and is 2"),
    ):
        captured = cli.run("train --output-dir run --resume", *options, code=2)
        assert message in captured.err
        assert "loading the model" not in captured.out
    adalora = ["--method", "adalora", "--set", "method.init_r=4", "--set", "method.target_r=2"]
    without_dropout = [a for a in common if a not in ("--lora-dropout", "0.1")]
    train(*without_dropout, *adalora, "--max-steps", "6", out="ada")
    error = cli.fails("train --output-dir ada --resume --max-steps 9")
    assert "its ranks are pruned by a schedule over all steps" in error
    train(*common, "--max-steps", "2", "--save-strategy", "no", out="bare")
    error = cli.fails("train --output-dir bare --resume --max-steps 9")
    assert (
        "it is finished and has no valid checkpoint. Continue from its adapter: --adapter bare"
    ) in error
    output = cli("train --output-dir bare --resume")
    assert "so no steps remain. To continue from its adapter: --adapter bare" in (output)


@pytest.mark.slow
def test_longer_run_of_equally_many_steps_is_accepted(common: list[str]) -> None:
    assert train(*common, "--epochs", "0.9")["steps"] == 3
    assert train("--resume", "--num-train-epochs", "1")["steps"] == 3


def test_summary_counts_steps_that_were_not_logged(common: list[str]) -> None:
    common[common.index("--dataset") + 1] = "data/train.jsonl"  # without validation rows
    common[common.index("--logging-steps") + 1] = "3"
    summary = train(*common, "--max-steps", "4")
    assert (summary["steps"], list(learning_rates("run"))) == (4, [1, 3])


def test_resume_without_adapter_file_trains_no_further(common: list[str]) -> None:
    train(*common, *CONSTANT, "--max-steps", "4", "--save-strategy", "steps", "--save-steps", "4")
    before = read_weights("run")
    Path("run/adapter/adapter_model.safetensors").unlink()
    summary = train("--resume")
    assert summary["steps"] == 4
    assert read_weights("run") == before
    assert summary["proof"]["gradient_tensors"] == 0, "none was looked at: no step was left"


@pytest.mark.slow
def test_checkpoints_are_saved_by_elapsed_time(
    common: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        """Advances by four minutes with each reading."""

        now = 0.0

        def monotonic(self) -> float:
            self.now += 240.0
            return self.now

    options = common[: common.index("--save-strategy")]
    with monkeypatch.context() as patch:
        patch.setattr("ftlevel.training.saving.time", Clock())
        train(*options, "--max-steps", "8", "--save-total-limit", "9")
        patch.setattr("ftlevel.training.saving.time", Clock())
        train(*options, "--max-steps", "8", "--save-strategy", "no", out="none")
        patch.setattr("ftlevel.training.session.SMALL_CHECKPOINT", 1000)
        train(*options, "--max-steps", "2", out="large")
    train(*options, "--max-steps", "2", out="quick")

    def checkpoints(out: str) -> list[str]:
        return sorted(p.name for p in Path(out, "checkpoints").glob("checkpoint-*"))

    assert checkpoints("run") == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    assert checkpoints("none") == checkpoints("large") == []
    assert checkpoints("quick") == ["checkpoint-2"], "its end, so that it can be made longer"
    assert all(
        Path("run/checkpoints", name, "manifest.json").exists() for name in checkpoints("run")
    )
