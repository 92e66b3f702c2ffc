"""Checkpoints by time, and runs that are extended.

A constant rate makes a longer run the same as one that was as long from the beginning.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlevel.cli.app import run

ModelDir = Callable[..., Path]
SHORT = ["--max-samples", "12", "--set", "data.max_eval_samples=4", "--batch-size", "4",
         "--dtype", "float32", "--overlong", "drop", "--logging-steps", "1",
         "--lora-dropout", "0.1", "--save-strategy", "epoch"]  # fmt: skip
CONSTANT = ["--lr-scheduler", "constant", "--learning-rate", "1e-3"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own(tiny_model_dir: ModelDir) -> list[str]:
    return ["--model", str(tiny_model_dir("llama", chat=True)), *SHORT]


def train(*arguments: str, out: str = "run") -> dict[str, Any]:
    """Run `ftlevel train` and return its summary."""
    assert run(["train", "--quiet", "--output-dir", out, *arguments]) == 0
    summary: dict[str, Any] = json.loads(Path(out, "summary.json").read_text())
    return summary


def weights(out: str) -> bytes:
    return Path(out, "adapter/adapter_model.safetensors").read_bytes()


def rates(out: str) -> dict[int, float]:
    records = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["learning_rate"] for r in records if "learning_rate" in r}


@pytest.mark.slow
def test_a_finished_run_made_longer_is_the_long_run(own: list[str]) -> None:
    train(*own, *CONSTANT, "--epochs", "4", out="long")
    train(*own, *CONSTANT, "--epochs", "2")
    summary = train("--resume", "--num-train-epochs", "4")
    assert (summary["steps"], summary["planned_steps"]) == (12, 12)
    assert weights("run") == weights("long")
    assert "num_train_epochs: 4" in Path("run/config.yaml").read_text()
    best, long = (json.loads(Path(out, "summary.json").read_text())["best"]
                  for out in ("run", "long"))  # fmt: skip
    assert best == long
    before = weights("run")
    train("--resume")
    assert weights("run") == before, "it is finished at its new length"


@pytest.mark.slow
def test_the_schedule_is_that_of_the_new_length(
    own: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = [*own, "--learning-rate", "1e-3"]
    train(*linear, "--max-steps", "3")
    assert rates("run")[3] == pytest.approx(1e-3 / 3)

    def fail(_: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step > 4:
            raise RuntimeError("the power failed")

    with monkeypatch.context() as patch:  # it is broken off before a checkpoint knows its length
        patch.setattr("ftlevel.training.callbacks.Report.on_step_end", fail)
        with pytest.raises(RuntimeError, match="power"):
            run(["train", "--output-dir", "run", "--resume", "--max-steps", "6", "--traceback"])
    summary = train("--resume")
    assert summary["steps"] == 6
    expected = {step: 1e-3 * (7 - step) / 6 for step in (4, 5, 6)}
    assert {step: rates("run")[step] for step in expected} == pytest.approx(expected)


@pytest.mark.slow
def test_what_cannot_be_made_longer(own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    train(*own, "--max-steps", "3")
    capsys.readouterr()
    for more, complaint in (
        (["--max-steps", "2"], "2 steps are fewer than the 3 already trained"),
        (["--num-train-epochs", "9"], "--num-train-epochs 9 has no effect: --max-steps 3 sets"),
        (["--max-steps", "9", "--lora-r", "2"], "not the same run: method.r was 8 and is 2"),
    ):
        assert run(["train", "--output-dir", "run", "--resume", *more]) == 2
        captured = capsys.readouterr()
        assert complaint in captured.err
        assert "loading the model" not in captured.out
    ranks = ["--method", "adalora", "--set", "method.init_r=4", "--set", "method.target_r=2"]
    plain = [a for a in own if a not in ("--lora-dropout", "0.1")]
    train(*plain, *ranks, "--max-steps", "6", out="ada")
    assert run(["train", "--output-dir", "ada", "--resume", "--max-steps", "9"]) == 2
    assert "its ranks are pruned by a schedule over all steps" in capsys.readouterr().err
    train(*own, "--max-steps", "2", "--save-strategy", "no", out="bare")
    assert run(["train", "--output-dir", "bare", "--resume", "--max-steps", "9"]) == 2
    assert (
        "it is finished and has no valid checkpoint. Continue from its adapter: --adapter bare"
    ) in capsys.readouterr().err
    assert run(["train", "--output-dir", "bare", "--resume"]) == 0
    assert "so no steps remain. To continue from its adapter: --adapter bare" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_a_run_that_only_lacks_its_adapter_is_not_trained_further(own: list[str]) -> None:
    train(*own, *CONSTANT, "--max-steps", "4", "--save-strategy", "steps", "--save-steps", "4")
    before = weights("run")
    Path("run/adapter/adapter_model.safetensors").unlink()
    summary = train("--resume")
    assert summary["steps"] == 4
    assert weights("run") == before
    assert summary["proof"]["gradient_tensors"] == 0, "none was looked at: no step was left"


@pytest.mark.slow
def test_a_run_is_saved_by_the_clock(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        """Four minutes go by whenever somebody looks."""

        now = 0.0

        def monotonic(self) -> float:
            self.now += 240.0
            return self.now

    plain = own[: own.index("--save-strategy")]
    with monkeypatch.context() as patch:
        patch.setattr("ftlevel.training.saving.time", Clock())
        train(*plain, "--max-steps", "8", "--save-total-limit", "9")
        patch.setattr("ftlevel.training.saving.time", Clock())
        train(*plain, "--max-steps", "8", "--save-strategy", "no", out="none")
        patch.setattr("ftlevel.training.build_trainer.SMALL_CHECKPOINT", 1000)
        train(*plain, "--max-steps", "2", out="large")
    train(*plain, "--max-steps", "2", out="quick")

    def saved(out: str) -> list[str]:
        return sorted(p.name for p in Path(out, "checkpoints").glob("checkpoint-*"))

    assert saved("run") == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    assert saved("none") == saved("large") == []
    assert saved("quick") == ["checkpoint-2"], "its end, so that it can be made longer"
    assert all(Path("run/checkpoints", name, "manifest.json").exists() for name in saved("run"))
