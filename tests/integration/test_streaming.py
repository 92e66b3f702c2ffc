"""`--streaming`: rows are read one at a time, and resume continues at the right row."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forked import Forked, run_slowly
from ftlevel.cli.app import run
from ftlevel.data.prepare import row_stream, streaming

ROWS = 240
STREAM = ["--streaming", "--batch-size", "4", "--lora-dropout", "0.1", "--logging-steps", "1",
          "--set", "data.shuffle_buffer=30", "--device", "cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def empty_working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def options(tiny_model_dir: Callable[..., Path]) -> list[str]:
    """Return `STREAM` with a tiny model."""
    return [*STREAM, "--model", str(tiny_model_dir("llama"))]


def create_row(i: int) -> dict[str, Any]:
    return {"prompt": f"say {i} please", "completion": f"it is {i * i}" + " and" * (i % 9)}


def write_jsonl(rows: list[dict[str, Any]]) -> str:
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return "rows.jsonl"


def train(*arguments: str, out: str = "run") -> dict[str, Any]:
    assert run(["train", "--quiet", "--output-dir", out, *arguments]) == 0
    summary: dict[str, Any] = json.loads(Path(out, "summary.json").read_text())
    return summary


def read_outcome(out: str) -> tuple[str, list[tuple[Any, ...]]]:
    """Return the adapter's digest and the logged values of each step."""
    weights = Path(out, "adapter/adapter_model.safetensors").read_bytes()
    records = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
    logged = {r["step"]: (r["step"], r["epoch"], r["loss"], r["grad_norm"], r["learning_rate"])
              for r in records if "loss" in r}  # fmt: skip
    return hashlib.sha256(weights).hexdigest(), list(logged.values())


def test_changed_row_outside_samples_is_detected_on_resume(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl([create_row(i) for i in range(3_000)])
    arguments = [*options, "--dataset", data, "--save-strategy", "steps", "--save-steps", "2"]
    train(*arguments, "--max-steps", "4")
    row_hashes = Path("run/checkpoints/digests.json").read_text()
    before = Path(data).read_text()
    resume_command = ["train", "--quiet", "--output-dir", "run", "--resume", "--max-steps", "6"]
    for number in (1_500, 2_900):
        Path(data).write_text(before.replace(f"say {number} please", f"say {number} plaese"))
        assert run(resume_command) == 2
        error = capsys.readouterr().err
        message = "data.fingerprint of file 1 was"
        assert f"not the same run: {message}" in error
        assert "--allow-change data.fingerprint" in error
    assert run([*resume_command, "--allow-change", "data.fingerprint"]) == 0
    assert "data.fingerprint of file 1" in capsys.readouterr().err
    assert Path("run/checkpoints/digests.json").read_text() != row_hashes


def test_interrupted_stream_resumes_like_uninterrupted_run(
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_jsonl([create_row(i) for i in range(5_000)])
    arguments = [*options, "--dataset", data, "--max-steps", "30"]
    train(*arguments, out="whole")
    command = ["train", *arguments, "--output-dir", "broken"]
    process = Forked(call=(run_slowly, (command,)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics, deadline = Path("broken/metrics.jsonl"), time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=240)
    assert process.returncode == 130, message
    [checkpoint] = Path("broken/checkpoints").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    cursor = json.loads((checkpoint / "stream.json").read_text())["cursor"]
    assert 4 * step <= cursor["line"] <= 4 * step + 30 + 64, "a step's rows, a buffer and a part"
    assert run(["train", "--quiet", "--output-dir", "broken", "--resume"]) == 0
    assert read_outcome("broken") == read_outcome("whole")
    lines = Path(data).read_text(encoding="utf-8").splitlines(keepends=True)
    lines[4_321] = json.dumps(create_row(0)) + "\n"  # beyond the first rows, with another length
    Path(data).write_text("".join(lines), encoding="utf-8")
    capsys.readouterr()
    resume_options = ["--resume", "--max-steps", "40"]
    assert run(["train", "--quiet", "--output-dir", "broken", *resume_options]) == 2
    assert "not the same run: data.fingerprint (rows) was" in capsys.readouterr().err


@pytest.mark.slow
def test_multi_epoch_stream_with_accumulation_resumes(options: list[str]) -> None:
    """Step 10 starts the third epoch of 36 rows; the first checkpoint is in the first epoch."""
    data = write_jsonl([create_row(i) for i in range(40)])
    arguments = [*options, "--no-fast", "--dataset", data, "--gradient-accumulation-steps", "2",
                 "--max-steps", "12", "--save-steps", "3", "--set", "data.validation_rows=4",
                 "--set", "train.save_total_limit=9"]  # fmt: skip
    summary = train(*arguments)
    assert summary["data"]["stream"]["passes"] == 2
    assert summary["data"]["train_rows"] == 96
    assert summary["data"]["validation_rows"] == 4
    expected = read_outcome("run")
    for step in (9, 3):
        for path in Path("run/checkpoints").glob("checkpoint-*"):
            if int(path.name.partition("-")[2]) > step:
                path.rename(Path(f"from-{step}-{path.name}"))
        train("--resume", out="run")
        assert read_outcome("run") == expected


def test_dry_run_reports_checks_of_first_rows_only(capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl([create_row(i) for i in range(1_500)])
    code = run(["train", "--dry-run", *STREAM, "--dataset", data, "--max-steps", "3"])
    out = capsys.readouterr().out
    assert code == 0
    assert (
        "data: rows.jsonl, read as it comes (shuffled within 30 rows; no validation rows: --set "
        "data.validation_rows=N holds some out)"
    ) in out
    assert (
        "max length: 46 tokens (auto: a quarter more than the longest of the first 1,000 rows, 37; "
        "a longer one is dropped, up to 1 % of the rows)"
    ) in out
    assert " in the first 1,000 rows (" in out
    assert (
        "data check: each row as it comes (exact_duplicates, near_duplicates, conflicting_answers, "
        "swapped_roles, one_answer, leaked, near_leaked checked in the first rows only)"
    ) in out
    assert run(["preview", *STREAM[:1], "--dataset", data, "--max-steps", "3"]) == 0
    assert "row 1" in capsys.readouterr().out


def test_evaluation_of_streamed_run_equals_training(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SAMPLE", 20)
    rows = [create_row(i) for i in range(60)]
    rows[50] = rows[3]  # a leak that training does not read before its evaluation
    summary = train(*options, "--dataset", write_jsonl(rows), "--max-steps", "2",
                    "--set", "data.validation_rows=10", "--max-eval-samples", "8")  # fmt: skip
    assert summary["data"]["validation_rows"] == 8
    capsys.readouterr()
    assert run(["evaluate", "run", "--json", "--no-base", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["data"]["examples"] == 8
    assert result["metrics"] == {k: summary["metrics"][k] for k in result["metrics"]}


LATE_ROW = 35  # after the first rows
INVALID_ROWS = {
    '{"prompt": "a" "completion": "b"}': "not valid JSON (Expecting ',' delimiter, column 16)",
    '{"prompt": 5, "completion": "b"}': "'prompt' is a number (5), but a string in most rows "
    "(line 1 for one)",
    '{"prompt": "a"}': "lacks 'completion', which the 20 other rows have (a value may be null, the "
    "key must be there)",
    '{"prompt": "a", "completion": null}': "'completion' is null",
}


def test_invalid_row_in_stream_is_reported(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SAMPLE", 20)
    lines = [json.dumps(create_row(i)) for i in range(60)]
    rows = Path("rows.jsonl")
    arguments = [*options, "--dataset", "rows.jsonl", "--max-steps", "12"]
    for number, (invalid_row, message) in enumerate(INVALID_ROWS.items()):
        rows_with_invalid = [*lines[: LATE_ROW - 1], invalid_row, *lines[LATE_ROW:]]
        rows.write_text("\n".join(rows_with_invalid) + "\n", encoding="utf-8")
        assert run(["train", "--quiet", "--output-dir", f"run{number}", *arguments]) == 2
        assert capsys.readouterr().err == (
            f"ftlevel: rows.jsonl:{LATE_ROW}: {message}. Fix the line, or drop bad rows with "
            "--on-bad-row skip.  [rows]\n"
        )
    rows.write_text(
        "\n".join([*lines[: LATE_ROW - 1], *INVALID_ROWS, *lines[LATE_ROW:]]) + "\n",
        encoding="utf-8",
    )
    summary = train(*arguments, "--on-bad-row", "skip", out="other")
    assert summary["data"]["dropped"] == summary["data"]["stream"]["dropped"] == len(INVALID_ROWS)


def test_rows_longer_than_first_rows_are_dropped_or_rejected(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SAMPLE", 200)
    monkeypatch.setattr(row_stream, "_MIN_ROWS", 200)
    long_row = {"prompt": "say " + "please " * 60, "completion": "no"}
    few_long_rows = [create_row(i) for i in range(220)] + [long_row] * 2
    arguments = [*options, "--batch-size", "20", "--max-steps", "12"]
    summary = train(*arguments, "--dataset", write_jsonl(few_long_rows))
    assert summary["data"]["stream"]["too_long"] == 2
    many_long_rows = [create_row(i) for i in range(220)] + [long_row] * 6
    assert run(["train", "--quiet", "--output-dir", "many", *arguments, "--dataset",
                write_jsonl(many_long_rows)]) == 2  # fmt: skip
    message = capsys.readouterr().err
    assert "rows read so far are longer than" in message
    assert "Set --max-length, or pass --overlong drop or truncate-prompt." in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Add --max-steps N."),
        (["--max-steps", "2", "--task", "text-classification"],
         "--streaming cannot be used with --task text-classification"),
        (["--max-steps", "2", "--validation-split", "0.1"], "Use --set data.validation_rows=N"),
        (["--max-steps", "2", "--max-samples", "5"], "--max-samples cannot be used with"),
        (["--max-steps", "2", "--dataset", "other.jsonl"], "--dataset other.jsonl cannot be "
                                                           "used with --streaming"),
        (["--max-steps", "2", "--set", "data.validation_rows=240"],
         "leaves none of the 240 rows of rows.jsonl to train on"),
        (["--max-steps", "2", "--split", "test"], "rows.jsonl is one file, without splits."),
    ],
)  # fmt: skip
def test_unsupported_streaming_options_are_rejected(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl([create_row(i) for i in range(ROWS)])
    code = run(["train", "--dry-run", "--streaming", "--dataset", data, *arguments])
    assert (code, message in capsys.readouterr().err) == (2, True)


def test_unsupported_streaming_sources_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.json").write_text(json.dumps([create_row(0)]), encoding="utf-8")
    code = run(["train", "--dry-run", "--streaming", "--max-steps", "1", "--dataset", "rows.json"])
    assert code == 2
    assert capsys.readouterr().err == (
        "ftlevel: rows.json: --streaming cannot read '.json' part by part. It reads .jsonl, "
        ".ndjson, .csv, .tsv, .parquet, .arrow, .feather, .txt, .xlsx, .conll, .bio, .iob, .iob2. "
        "Convert the file, or drop --streaming.  [files]\n"
    )
    code = run(["train", "--dry-run", "--streaming", "--max-steps", "1"])
    assert code == 2
    assert "--streaming: builtin:docstrings is in memory already" in capsys.readouterr().err
