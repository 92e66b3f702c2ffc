"""`--streaming`: rows are read as they come, and resumed at the right row."""

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
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(tiny_model_dir: Callable[..., Path]) -> list[str]:
    """Return `STREAM` with a tiny model."""
    return [*STREAM, "--model", str(tiny_model_dir("llama"))]


def row(i: int) -> dict[str, Any]:
    return {"prompt": f"say {i} please", "completion": f"it is {i * i}" + " and" * (i % 9)}


def write_jsonl(rows: list[dict[str, Any]]) -> str:
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return "rows.jsonl"


def train(*arguments: str, out: str = "run") -> dict[str, Any]:
    assert run(["train", "--quiet", "--output-dir", out, *arguments]) == 0
    summary: dict[str, Any] = json.loads(Path(out, "summary.json").read_text())
    return summary


def outcome(out: str) -> tuple[str, list[tuple[Any, ...]]]:
    """Return the adapter's digest and what was logged of each step."""
    weights = Path(out, "adapter/adapter_model.safetensors").read_bytes()
    records = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
    logged = {r["step"]: (r["step"], r["epoch"], r["loss"], r["grad_norm"], r["learning_rate"])
              for r in records if "loss" in r}  # fmt: skip
    return hashlib.sha256(weights).hexdigest(), list(logged.values())


def test_a_row_between_the_samples_is_not_another_one(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl([row(i) for i in range(3_000)])
    arguments = [*small, "--dataset", data, "--save-strategy", "steps", "--save-steps", "2"]
    train(*arguments, "--max-steps", "4")
    kept = Path("run/checkpoints/rows.json").read_text()
    before = Path(data).read_text()
    again = ["train", "--quiet", "--output-dir", "run", "--resume", "--max-steps", "6"]
    for number in (1_500, 2_900):
        Path(data).write_text(before.replace(f"say {number} please", f"say {number} plaese"))
        assert run(again) == 2
        said = capsys.readouterr().err
        message = "the bytes of the rows have changed since it started: file 1"
        assert f"not the same run: {message}" in said
        assert "--allow-change data.fingerprint" in said
    assert run([*again, "--allow-change", "data.fingerprint"]) == 0
    assert "data.fingerprint of file 1" in capsys.readouterr().err
    assert Path("run/checkpoints/rows.json").read_text() != kept


def test_ctrl_c_and_resuming_give_the_unbroken_run_and_read_nothing_again(
    small: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_jsonl([row(i) for i in range(5_000)])
    arguments = [*small, "--dataset", data, "--max-steps", "30"]
    train(*arguments, out="whole")
    command = ["train", *arguments, "--output-dir", "broken"]
    process = Forked(call=(run_slowly, (command,)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics, deadline = Path("broken/metrics.jsonl"), time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=240)
    assert process.returncode == 130, complaint
    [kept] = Path("broken/checkpoints").glob("checkpoint-*")
    step = int(kept.name.partition("-")[2])
    cursor = json.loads((kept / "stream.json").read_text())["cursor"]
    assert 4 * step <= cursor["line"] <= 4 * step + 30 + 64, "a step's rows, a buffer and a part"
    assert run(["train", "--quiet", "--output-dir", "broken", "--resume"]) == 0
    assert outcome("broken") == outcome("whole")
    lines = Path(data).read_text(encoding="utf-8").splitlines(keepends=True)
    lines[4_321] = json.dumps(row(0)) + "\n"  # past the first rows, and of another length
    Path(data).write_text("".join(lines), encoding="utf-8")
    capsys.readouterr()
    more = ["--resume", "--max-steps", "40"]
    assert run(["train", "--quiet", "--output-dir", "broken", *more]) == 2
    assert "not the same run: data.fingerprint was" in capsys.readouterr().err


@pytest.mark.slow
def test_several_passes_and_accumulated_steps_resume(small: list[str]) -> None:
    """36 rows are gone through twice by step 10; the first checkpoint lies in the first pass."""
    data = write_jsonl([row(i) for i in range(40)])
    arguments = [*small, "--no-fast", "--dataset", data, "--gradient-accumulation-steps", "2",
                 "--max-steps", "12", "--save-steps", "3", "--set", "data.validation_rows=4",
                 "--set", "train.save_total_limit=9"]  # fmt: skip
    summary = train(*arguments)
    assert summary["data"]["stream"]["passes"] == 2
    assert summary["data"]["train_rows"] == 96
    assert summary["data"]["validation_rows"] == 4
    unbroken = outcome("run")
    for step in (9, 3):
        for path in Path("run/checkpoints").glob("checkpoint-*"):
            if int(path.name.partition("-")[2]) > step:
                path.rename(Path(f"from-{step}-{path.name}"))
        train("--resume", out="run")
        assert outcome("run") == unbroken


def test_what_is_known_of_the_first_rows_only_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl([row(i) for i in range(1_500)])
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


LATE = 35  # beyond the first rows, and reached
BAD = {
    '{"prompt": "a" "completion": "b"}': "not valid JSON (Expecting ',' delimiter, column 16)",
    '{"prompt": 5, "completion": "b"}': "'prompt' is a number (5), but a string in most rows "
    "(line 1 for one)",
    '{"prompt": "a"}': "lacks 'completion', which the 20 other rows have (a value may be null, the "
    "key must be there)",
    '{"prompt": "a", "completion": null}': "'completion' is null",
}


def test_a_bad_row_is_named_when_it_comes(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SAMPLE", 20)
    lines = [json.dumps(row(i)) for i in range(60)]
    rows = Path("rows.jsonl")
    arguments = [*small, "--dataset", "rows.jsonl", "--max-steps", "12"]
    for number, (bad, message) in enumerate(BAD.items()):
        own = [*lines[: LATE - 1], bad, *lines[LATE:]]
        rows.write_text("\n".join(own) + "\n", encoding="utf-8")
        assert run(["train", "--quiet", "--output-dir", f"run{number}", *arguments]) == 2
        assert capsys.readouterr().err == (
            f"ftlevel: rows.jsonl:{LATE}: {message}. Fix the line, or drop bad rows with "
            "--on-bad-row skip.  [rows]\n"
        )
    rows.write_text("\n".join([*lines[: LATE - 1], *BAD, *lines[LATE:]]) + "\n", encoding="utf-8")
    summary = train(*arguments, "--on-bad-row", "skip", out="other")
    assert summary["data"]["dropped"] == summary["data"]["stream"]["dropped"] == len(BAD)


def test_longer_rows_than_the_first_ones(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SAMPLE", 200)
    monkeypatch.setattr(row_stream, "_MIN_ROWS", 200)
    long = {"prompt": "say " + "please " * 60, "completion": "no"}
    few = [row(i) for i in range(220)] + [long] * 2
    arguments = [*small, "--batch-size", "20", "--max-steps", "12"]
    summary = train(*arguments, "--dataset", write_jsonl(few))
    assert summary["data"]["stream"]["too_long"] == 2
    many = [row(i) for i in range(220)] + [long] * 6
    assert run(["train", "--quiet", "--output-dir", "many", *arguments, "--dataset",
                write_jsonl(many)]) == 2  # fmt: skip
    complaint = capsys.readouterr().err
    assert "rows read so far are longer than" in complaint
    assert "Set --max-length, or pass --overlong drop or truncate-prompt." in complaint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Add --max-steps N."),
        (["--max-steps", "2", "--task", "text-classification"],
         "--streaming cannot be used with --task text-classification"),
        (["--max-steps", "2", "--validation-split", "0.1"], "Use --set data.validation_rows=N"),
        (["--max-steps", "2", "--max-samples", "5"], "--max-samples cannot be used with"),
        (["--max-steps", "2", "--dataset", "other.jsonl"], "--streaming reads one dataset. Use "
                                                           "one --dataset, or drop --streaming."),
        (["--max-steps", "2", "--set", "data.validation_rows=240"],
         "leaves none of the 240 rows of rows.jsonl to train on"),
        (["--max-steps", "2", "--split", "test"], "rows.jsonl is one file, without splits."),
    ],
)  # fmt: skip
def test_what_cannot_be_streamed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl([row(i) for i in range(ROWS)])
    code = run(["train", "--dry-run", "--streaming", "--dataset", data, *arguments])
    assert (code, message in capsys.readouterr().err) == (2, True)


def test_what_is_no_stream(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.json").write_text(json.dumps([row(0)]), encoding="utf-8")
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
