"""Experiment trackers log a run offline."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from command_line import Cli
from ftlevel.events import NullListener
from ftlevel.training import callbacks as trackers
from ftlevel.training.callbacks import RunInfo, Tracker, name_metrics, tracking

LOSS, EVALUATION = {"step": 3, "loss": 0.5, "epoch": 1.0}, {"step": 3, "eval_loss": 0.7}


class RecordingListener:
    """A listener that records choices and warnings."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def choices(self, _: str, choices: Any) -> None:
        self.lines += [f"{c.name}: {c}" for c in choices]

    def warn(self, line: str) -> None:
        self.warnings.append(line)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def track_two_records(
    name: str, folder: Path, listener: RecordingListener, **run_info: Any
) -> None:
    """Log two records with one tracker, and assert that the environment is restored."""
    before = dict(os.environ)
    fields = {"name": "first", "project": "mine", "config": {"train": {"seed": 3}}, **run_info}
    with tracking((name,), RunInfo(folder, **fields), listener) as writers:
        for record in (LOSS, EVALUATION):
            for write in writers:
                write(record)
    assert dict(os.environ) == before


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_environment_set_during_a_run_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FTLEVEL_TEST", raising=False)
    with tracking((), RunInfo(tmp_path, "run", None, {}), NullListener()):
        monkeypatch.setenv("FTLEVEL_TEST", "1")  # as by a callback
    assert os.environ["FTLEVEL_TEST"] == "1"


def test_metric_names_match_transformers() -> None:
    assert name_metrics({**LOSS, "note": "x"}) == {"train/loss": 0.5, "train/epoch": 1.0}
    assert name_metrics(EVALUATION) == {"eval/loss": 0.7}


@pytest.mark.slow
def test_run_logs_to_tensorboard(tmp_path: Path, cli: Cli) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ["--report-to", "tensorboard", "--max-steps", "2", "--logging-steps", "1",
                 "--max-samples", "8", "--max-length", "96", "--overlong", "drop", "--quiet",
                 "--set", "train.predict_with_generate=false",
                 "--set", "data.max_eval_samples=4", "--output-dir", "run"]  # fmt: skip
    cli("train", *arguments)
    files = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    scalars = {(e.step, round(e.value, 5)) for e in files.Scalars("train/loss")}
    logged = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert scalars == {(r["step"], round(r["loss"], 5)) for r in logged if "loss" in r}
    assert len(scalars) == 2
    assert files.Scalars("eval/loss")[-1].step == 2  # after the last step
    assert not list(Path("run").glob("checkpoints/runs*"))


def test_wandb_logs_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    listener = RecordingListener()
    track_two_records("wandb", tmp_path, listener)
    (run_dir,) = tmp_path.glob("wandb/offline-run-*")
    assert f"not logged in: `wandb sync {run_dir}` sends it" in listener.lines[0]
    (file,) = run_dir.glob("*.wandb")
    content = file.read_bytes()
    for part in (b"mine", b"first", b"train/loss", b"eval/loss", b"seed"):
        assert part in content
    assert not listener.warnings


@pytest.mark.slow
def test_mlflow_logs_to_local_database(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    track_two_records("mlflow", tmp_path, RecordingListener())
    assert not mlflow.is_tracking_uri_set()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    (logged_run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (logged_run.info.run_name, logged_run.info.status) == ("first", "FINISHED")
    assert logged_run.data.params == {"train.seed": "3"}
    assert logged_run.data.metrics == {"train/loss": 0.5, "train/epoch": 1.0, "eval/loss": 0.7}


def test_trackio_logs_locally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    track_two_records("trackio", tmp_path, RecordingListener())
    logs = SQLiteStorage.get_logs("mine", "first")
    assert [log.get("train/loss") for log in logs] == [0.5, None]
    assert logs[1]["eval/loss"] == 0.7
    assert not capsys.readouterr().out  # stdout may be reserved for JSON


def test_failed_tracker_is_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise OSError("no space")

    monkeypatch.setitem(trackers._BEGIN, "wandb", lambda _: Tracker("nowhere", fail, fail))
    listener = RecordingListener()
    track_two_records("wandb", tmp_path, listener)
    assert len(calls) == 2  # the first record, and the end
    assert listener.warnings == ["wandb failed, and is disabled: no space"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report-to", "all"], "all would use every installed tracker. Name the trackers"),
        (["--report-to", "tensorboard,comet"], "'comet' is not known. Expected one of"),
        (
            ["--tracker-project", "x"],
            "--tracker-project x needs --report-to wandb: it is the tracker's. Add",
        ),
        (["--report-to", "wandb"], 'pip install "ftlevel[wandb]", or drop it.'),
    ],
)
def test_invalid_tracker_options_are_rejected(
    arguments: list[str], message: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftlevel.training.plan.resolve.find_spec", lambda _: None)
    assert message in cli.fails("train --dry-run", *arguments)
