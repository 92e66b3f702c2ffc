"""Experiment trackers log a run offline."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ftlevel.cli.app import run
from ftlevel.training import callbacks as trackers
from ftlevel.training.callbacks import RunInfo, Tracker, name_metrics, tracking

LOSS, EVALUATION = {"step": 3, "loss": 0.5, "epoch": 1.0}, {"step": 3, "eval_loss": 0.7}


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def choices(self, _: str, choices: Any) -> None:
        self.lines += [f"{c.name}: {c}" for c in choices]

    def warn(self, line: str) -> None:
        self.warnings.append(line)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def send(name: str, folder: Path, heard: Heard, **about: Any) -> None:
    """Tell one tracker of a run with two records; the environment is as it was afterwards."""
    before = dict(os.environ)
    told = {"name": "first", "project": "mine", "config": {"train": {"seed": 3}}, **about}
    with tracking((name,), RunInfo(folder, **told), heard) as writers:
        for record in (LOSS, EVALUATION):
            for write in writers:
                write(record)
    assert dict(os.environ) == before


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_names_are_those_of_transformers() -> None:
    assert name_metrics({**LOSS, "note": "x"}) == {"train/loss": 0.5, "train/epoch": 1.0}
    assert name_metrics(EVALUATION) == {"eval/loss": 0.7}


@pytest.mark.slow
def test_a_run_in_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ["--report-to", "tensorboard", "--max-steps", "2", "--logging-steps", "1",
                 "--max-samples", "8", "--max-length", "96", "--overlong", "drop", "--quiet",
                 "--set", "train.predict_with_generate=false",
                 "--set", "data.max_eval_samples=4", "--output-dir", "run"]  # fmt: skip
    assert run(["train", *arguments]) == 0
    files = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    seen = {(e.step, round(e.value, 5)) for e in files.Scalars("train/loss")}
    logged = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert seen == {(r["step"], round(r["loss"], 5)) for r in logged if "loss" in r}
    assert len(seen) == 2
    assert files.Scalars("eval/loss")[-1].step == 2  # after the last step
    assert not list(Path("run").glob("checkpoints/runs*"))


def test_a_run_in_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    heard = Heard()
    send("wandb", tmp_path, heard)
    (kept,) = tmp_path.glob("wandb/offline-run-*")
    assert f"not logged in: `wandb sync {kept}` sends it" in heard.lines[0]
    (file,) = kept.glob("*.wandb")
    content = file.read_bytes()
    for part in (b"mine", b"first", b"train/loss", b"eval/loss", b"seed"):
        assert part in content
    assert not heard.warnings


@pytest.mark.slow
def test_a_run_in_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    send("mlflow", tmp_path, Heard())
    assert not mlflow.is_tracking_uri_set()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.params == {"train.seed": "3"}
    assert found.data.metrics == {"train/loss": 0.5, "train/epoch": 1.0, "eval/loss": 0.7}


def test_a_run_in_trackio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    send("trackio", tmp_path, Heard())
    logs = SQLiteStorage.get_logs("mine", "first")
    assert [log.get("train/loss") for log in logs] == [0.5, None]
    assert logs[1]["eval/loss"] == 0.7
    assert not capsys.readouterr().out  # which may be one JSON object


def test_a_tracker_that_fails_is_told_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise OSError("no space")

    monkeypatch.setitem(trackers._BEGIN, "wandb", lambda _: Tracker("nowhere", fail, fail))
    heard = Heard()
    send("wandb", tmp_path, heard)
    assert len(calls) == 2  # the first record, and the end
    assert heard.warnings == ["wandb failed, and is disabled: no space"] * 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--report-to", "all"], "all depends on what is installed. Name the trackers"),
        (["--report-to", "tensorboard,comet"], "'comet' is not known. Expected one of"),
        (
            ["--tracker-project", "x"],
            "--tracker-project x needs a tracker. Add --report-to wandb (or another), or drop it.",
        ),
        (["--report-to", "wandb"], 'pip install "ftlevel[wandb]", or drop it.'),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ftlevel.training.plan.resolve.find_spec", lambda _: None)
    assert run(["train", "--dry-run", *arguments]) == 2
    assert told in capsys.readouterr().err
