"""`compare`: methods side by side, killed and gone on with; what cannot work; what is refused.

The runs of a forked comparison are forked, too; of one in this process a fork server starts them.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import forked
from forked import Forked
from ftlevel.cli.app import run
from ftlevel.extras.compare.cli import table_lines

METHODS = ("lora", "ia3")
WAIT = 240  # seconds, on a busy machine


@dataclass(frozen=True)
class Killed:
    """A comparison that was killed in its second run, and gone on with."""

    path: Path
    kept: float
    found: dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> Path:
    """Return a folder of rows, beside which lies a tiny model."""
    path = tmp_path_factory.mktemp("data") / "rows"
    path.mkdir()
    (path.parent / "model").symlink_to(tiny_model_dir("llama"))
    for name, these in (("train", range(24)), ("validation", range(100, 116))):
        lines = [{"text": f"what holds of item {at} is {at % 7} of {at % 5}"} for at in these]
        path.joinpath(f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def flags(rows: Path, out: Path, *others: str) -> list[str]:
    return ["compare", "--dataset", str(rows), "--task", "text-generation", "--map", "text=text",
            "--max-length", "32", "--model", str(rows.parent / "model"), "--output-dir", str(out),
            *others]  # fmt: skip


def wait_for(done: Any, process: Forked) -> None:
    end = time.monotonic() + WAIT
    while not done():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    path = tmp_path_factory.mktemp("compared") / "runs"
    asked = flags(rows, path, "--methods", ",".join(METHODS), "--budget-steps", "3",
                  "--seeds", "2", "--seed", "1", "--quiet")  # fmt: skip
    process = Forked(asked, stdout=subprocess.PIPE)
    first = path / "scores" / "lora-seed1.json"
    wait_for(lambda: first.is_file() and (path / "ia3-seed1").is_dir(), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = (path / "lora-seed1" / "summary.json").stat().st_mtime
    assert process.stdout is not None
    process.stdout.read()  # ends when the process of the second run, which has it too, has ended
    forked.run("compare", "--resume", "--output-dir", str(path), "--quiet")
    return Killed(path, kept, json.loads((path / "compare.json").read_text()))


@pytest.mark.slow
def test_a_killed_comparison_goes_on(killed: Killed) -> None:
    assert (killed.path / "lora-seed1" / "summary.json").stat().st_mtime == killed.kept
    for method in METHODS:
        for seed in (1, 2):
            summary = json.loads(
                (killed.path / f"{method}-seed{seed}" / "summary.json").read_text()
            )
            assert summary["method"] == method
            assert summary["steps"] == 3


@pytest.mark.slow
def test_the_table_is_of_the_runs(killed: Killed, capsys: pytest.CaptureFixture[str]) -> None:
    found = killed.found
    assert {row["method"] for row in found["rows"]} == set(METHODS)
    assert found["headline"] == "perplexity"
    metrics = [row["metric"] for row in found["rows"]]
    assert metrics == sorted(metrics)
    assert found["best"] == found["rows"][0]["method"]
    for row in found["rows"]:
        of_seeds = [
            json.loads((killed.path / f"{row['method']}-seed{seed}" / "summary.json").read_text())
            for seed in (1, 2)
        ]
        scores = [summary["metrics"]["perplexity"] for summary in of_seeds]
        assert row["metric"] == pytest.approx(statistics.fmean(scores), rel=1e-5)
        assert row["spread"] == pytest.approx(statistics.stdev(scores), rel=1e-3, abs=1e-6)
        assert row["trained"] == of_seeds[0]["trainable_parameters"]
        low, high = row["interval"]
        assert low < row["metric"] < high
        assert row["adapter_bytes"] > 4 * row["trained"] * 0.9
        assert row["seconds"] > 0
    assert found["left_out"] == []
    assert "torch" in found["versions"]
    page = (killed.path / "report.html").read_text()
    assert all(f"{method}-seed{seed}" in page for method in METHODS for seed in (1, 2))

    command = found["command"].split()
    assert command[:2] == ["ftlevel", "train"]
    assert run([*command[1:], "--dry-run", "--json"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert dry["config"]["train"]["max_steps"] is None
    assert dry["config"]["method"]["kind"] == found["best"]


@pytest.mark.slow
def test_what_was_asked_stays(
    killed: Killed, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = flags(rows, killed.path, "--methods", "lora", "--lora-r", "4", "--resume")
    assert run(other) == 2
    assert "not the same comparison: " in capsys.readouterr().err
    assert (
        run(["compare", "--resume", "--output-dir", str(killed.path), "--budget-steps", "4"]) == 2
    )
    assert "the budget was" in capsys.readouterr().err


@pytest.mark.slow
def test_the_loss_ranks_where_generation_is_off_and_the_metric_may_change(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(rows.parent / "model")
    rows = tmp_path / "rows.jsonl"
    lines = [{"document": f"item {at} of {at % 7}", "summary": f"{at % 5}"} for at in range(24)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "runs"
    asked = ["compare", "--dataset", str(rows), "--task", "summarization", "--validation-split",
             "0.25", "--no-predict-with-generate", "--methods", "lora", "--budget-steps", "2",
             "--model", model, "--output-dir", str(out), "--json"]  # fmt: skip
    assert run([*asked, "--metric-for-best-model", "rougeL"]) == 2
    assert "It is scored with --predict-with-generate" in capsys.readouterr().err
    assert not out.exists()
    found = json.loads(forked.run(*asked).stdout)
    assert found["headline"] == "loss"
    assert "ranked by loss: rougeL is not scored (--predict-with-generate)" in found["notes"]
    trained = (out / "lora-seed42" / "summary.json").stat().st_mtime_ns

    again = ["compare", "--resume", "--output-dir", str(out), "--json"]
    ranked = json.loads(forked.run(*again, "--metric-for-best-model", "perplexity").stdout)
    assert ranked["headline"] == "perplexity"
    ranked = json.loads(forked.run(*again, "--metric-for-best-model", "loss").stdout)
    assert ranked["rows"][0]["metric"] == found["rows"][0]["metric"]
    assert (out / "lora-seed42" / "summary.json").stat().st_mtime_ns == trained


@pytest.mark.slow
def test_a_method_that_cannot_work_is_left_out(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "compared-1").mkdir(parents=True)
    asked = flags(rows, tmp_path, "--methods", "qlora,ln-tuning", "--quant", "none",
                  "--budget-steps", "2", "--json")  # fmt: skip
    at = asked.index("--output-dir")
    assert run([*asked[:at], *asked[at + 2 :]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == "runs/compared-2"
    assert [row["method"] for row in found["rows"]] == ["ln-tuning"]
    (left,) = found["left_out"]
    assert left["method"] == "qlora"
    assert "--quant" in left["reason"]
    assert found["rows"][0]["spread"] is None
    assert any("one seed" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "--methods is missing"),
        (("--methods", "lora,lorra"), "'lorra' is no method."),
        (("--methods", "lora", "--budget-steps", "2", "--budget-minutes", "1"), "two budgets"),
        (("--methods", "lora", "--budget-steps", "2", "--max-steps", "3"), "say the same"),
        (("--methods", "lora", "--max-memory", "0"), "--max-memory 0: expected a number above 0"),
        (("--methods", "ia3", "--lora-r", "4"), "method.r is of none of the compared methods"),
        (("--methods", "qlora", "--quant", "none"), "qlora: "),
        (("--methods", "lora", "--search", "lr", "--study", "x.db"), "expected a database URL"),
    ],
)
def test_what_is_refused(
    arguments: tuple[str, ...], text: str, rows: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(flags(rows, tmp_path / "runs", *arguments)) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_searches_share_a_study_and_the_winner_has_what_they_found(
    rows: Path, tmp_path: Path
) -> None:
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("matplotlib")
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    asked = ("--methods", "lora", "--budget-steps", "3", "--search", "lr,r", "--trials", "3",
             "--study", url, "--json")  # fmt: skip
    other = flags(rows, tmp_path / "theirs", *asked)
    process = Forked(other, stdout=subprocess.PIPE)
    ours = json.loads(forked.run(*flags(rows, tmp_path / "ours", *asked)).stdout)
    theirs = json.loads(process.communicate(timeout=WAIT)[0])
    (row,) = ours["rows"]
    searched = row["search"]
    assert theirs["rows"][0]["search"]["values"] == searched["values"]

    study = optuna.load_study(study_name=searched["name"], storage=url)
    ended = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    assert len(ended) == searched["trials"] == 3  # where both begin the last one, one withdraws
    best = min(trial.value for trial in ended if trial.state.name == "COMPLETE")
    assert searched["best"] == best
    assert searched["seconds"] > 0
    heading, figures = table_lines(theirs)
    assert heading.endswith("search")
    assert figures.endswith(f"{theirs['rows'][0]['search']['seconds']:,.1f} s")
    assert row["metric"] == pytest.approx(best, rel=1e-4)  # the same run, made again
    values = searched["values"]
    run_config = yaml.safe_load((Path(row["run"]) / "config.yaml").read_text())
    assert run_config["train"]["learning_rate"] == values["train.learning_rate"]
    assert run_config["method"]["r"] == values["method.r"]
    assert f"--set method.r={values['method.r']}" in ours["command"]
    assert not list((tmp_path / "ours" / "search").iterdir())  # of a trial its figures stay

    pictures = {Path(place).name for place in ours["pictures"]}
    names = ("metric-against-memory", "metric-against-time", "loss", "search")
    assert pictures == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for place in map(Path, ours["pictures"]):
        assert place.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_what_a_search_needs_is_named(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ftlevel.extras.compare.search.find_spec", lambda _: None)
    asked = flags(rows, tmp_path / "runs", "--methods", "lora", "--search", "lr,rr")
    assert run(asked) == 2
    said = capsys.readouterr().err
    assert "--search: 'rr' is no setting that is searched." in said
    assert "optuna, which is not installed." in said
    assert 'pip install "ftlevel[search]"' in said
