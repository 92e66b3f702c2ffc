"""`compare`: ranking methods, resuming after a kill, skipped methods, rejected arguments.

Forked comparisons fork their runs too; in-process ones start them from a fork server.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import forked
from command_line import Cli
from forked import Forked
from ftlevel.cli.app import run
from ftlevel.extras.compare.cli import table_lines
from run_files import ModelDir, read_json, read_summary, write_rows

METHODS = ("lora", "ia3")
WAIT = 240  # seconds, on a busy machine


@dataclass(frozen=True)
class KilledComparison:
    """A comparison that was killed during its second run, then resumed."""

    path: Path
    first_run_mtime: float
    result: dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: ModelDir) -> Path:
    """Return a folder of rows with a tiny model next to it."""
    path = tmp_path_factory.mktemp("data") / "rows"
    path.mkdir()
    (path.parent / "model").symlink_to(tiny_model_dir("llama"))
    for name, these in (("train", range(24)), ("validation", range(100, 116))):
        lines = [{"text": f"what holds of item {at} is {at % 7} of {at % 5}"} for at in these]
        write_rows(path.joinpath(f"{name}.jsonl"), lines)
    return path


def build_arguments(rows: Path, out: Path, *others: str) -> list[str]:
    return ["compare", "--dataset", str(rows), "--task", "text-generation", "--map", "text=text",
            "--max-length", "32", "--model", str(rows.parent / "model"), "--output-dir", str(out),
            *others]  # fmt: skip


def wait_until(condition: Any, process: Forked) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed_comparison(
    rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KilledComparison]:
    path = tmp_path_factory.mktemp("compared") / "runs"
    arguments = build_arguments(rows, path, "--methods", ",".join(METHODS), "--budget-steps", "3",
                                "--seeds", "2", "--seed", "1", "--set", "method.r=2",
                                "--quiet")  # fmt: skip
    process = Forked(arguments, stdout=subprocess.PIPE)
    first = path / "scores" / "lora-seed1.json"
    wait_until(lambda: first.is_file() and (path / "ia3-seed1").is_dir(), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first_run_mtime = (path / "lora-seed1" / "summary.json").stat().st_mtime
    assert process.stdout is not None
    process.stdout.read()  # until the process of the second run, which inherited it, has ended
    forked.run("compare", "--resume", "--output-dir", str(path), "--quiet")
    return KilledComparison(path, first_run_mtime, read_json(path / "compare.json"))


@pytest.mark.slow
def test_killed_comparison_resumes_without_repeating_runs(
    killed_comparison: KilledComparison,
) -> None:
    assert (
        killed_comparison.path / "lora-seed1" / "summary.json"
    ).stat().st_mtime == killed_comparison.first_run_mtime
    for method in METHODS:
        for seed in (1, 2):
            summary = read_summary(killed_comparison.path / f"{method}-seed{seed}")
            assert summary["method"] == method
            assert summary["steps"] == 3


@pytest.mark.slow
def test_methods_keep_settings_of_the_recipe_that_they_have(
    killed_comparison: KilledComparison,
) -> None:
    lora, ia3 = (
        yaml.safe_load((killed_comparison.path / f"{method}-seed1" / "config.yaml").read_text())
        for method in METHODS
    )
    assert lora["method"]["r"] == 2
    assert "r" not in ia3["method"]


@pytest.mark.slow
def test_table_matches_run_summaries(killed_comparison: KilledComparison, cli: Cli) -> None:
    result = killed_comparison.result
    assert {row["method"] for row in result["rows"]} == set(METHODS)
    assert result["headline"] == "perplexity"
    metrics = [row["metric"] for row in result["rows"]]
    assert metrics == sorted(metrics)
    assert result["best"] == result["rows"][0]["method"]
    for row in result["rows"]:
        summaries = [
            read_summary(killed_comparison.path / f"{row['method']}-seed{seed}") for seed in (1, 2)
        ]
        scores = [summary["metrics"]["perplexity"] for summary in summaries]
        assert row["metric"] == pytest.approx(statistics.fmean(scores), rel=1e-5)
        assert row["spread"] == pytest.approx(statistics.stdev(scores), rel=1e-3, abs=1e-6)
        assert row["trained"] == summaries[0]["trainable_parameters"]
        low, high = row["interval"]
        assert low < row["metric"] < high
        assert row["adapter_bytes"] > 4 * row["trained"] * 0.9
        assert row["seconds"] > 0
    assert result["left_out"] == []
    assert "torch" in result["versions"]
    page = (killed_comparison.path / "report.html").read_text()
    assert all(f"{method}-seed{seed}" in page for method in METHODS for seed in (1, 2))

    command = result["command"].split()
    assert command[:2] == ["ftlevel", "train"]
    dry_run = cli.json(*command[1:], "--dry-run --json")
    assert dry_run["config"]["train"]["max_steps"] is None
    assert command[3:] == ["--set", "train.max_steps=null", "--set", "train.learning_rate=null"]
    assert dry_run["config"]["method"]["kind"] == result["best"]


@pytest.mark.slow
def test_resume_with_other_settings_is_rejected(
    killed_comparison: KilledComparison, rows: Path, cli: Cli
) -> None:
    changed = build_arguments(
        rows, killed_comparison.path, "--methods", "lora", "--lora-r", "4", "--resume"
    )
    assert "not the same comparison: " in cli.fails(*changed)
    error = cli.fails(f"compare --resume --output-dir {killed_comparison.path} --budget-steps 4")
    assert "the budget was" in error
    resume = ["compare", "--resume", "--output-dir", str(killed_comparison.path)]
    for name, value in (("search", "lr"), ("trials", "3"), ("study", "sqlite:///x.db")):
        assert f"--{name} was not given. Drop it" in cli.fails(*resume, f"--{name}", value)


@pytest.mark.slow
def test_ranking_metric_can_change_on_resume(tmp_path: Path, rows: Path, cli: Cli) -> None:
    model = str(rows.parent / "model")
    rows = tmp_path / "rows.jsonl"
    lines = [{"document": f"item {at} of {at % 7}", "summary": f"{at % 5}"} for at in range(24)]
    write_rows(rows, lines)
    out = tmp_path / "runs"
    arguments = ["compare", "--dataset", str(rows), "--task", "summarization", "--validation-split",
                 "0.25", "--no-predict-with-generate", "--methods", "lora", "--budget-steps", "2",
                 "--model", model, "--output-dir", str(out), "--json"]  # fmt: skip
    error = cli.fails(*arguments, "--metric-for-best-model rougeL")
    assert "It is scored with --predict-with-generate" in error
    assert not out.exists()
    result = json.loads(forked.run(*arguments).stdout)
    assert result["headline"] == "loss"
    assert "ranked by loss: rougeL is not scored (--predict-with-generate)" in result["notes"]
    trained_mtime = (out / "lora-seed42" / "summary.json").stat().st_mtime_ns

    resume = ["compare", "--resume", "--output-dir", str(out), "--json"]
    ranked = json.loads(forked.run(*resume, "--metric-for-best-model", "perplexity").stdout)
    assert ranked["headline"] == "perplexity"
    ranked = json.loads(forked.run(*resume, "--metric-for-best-model", "loss").stdout)
    assert ranked["rows"][0]["metric"] == result["rows"][0]["metric"]
    assert (out / "lora-seed42" / "summary.json").stat().st_mtime_ns == trained_mtime


@pytest.mark.slow
def test_incompatible_method_is_skipped_with_reason(
    rows: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "compared-1").mkdir(parents=True)
    arguments = build_arguments(rows, tmp_path, "--methods", "qlora,ln-tuning", "--quant", "none",
                                "--budget-steps", "2", "--json")  # fmt: skip
    index = arguments.index("--output-dir")
    result = cli.json(*arguments[:index], *arguments[index + 2 :])
    assert result["path"] == "runs/compared-2"
    assert [row["method"] for row in result["rows"]] == ["ln-tuning"]
    (skipped,) = result["left_out"]
    assert skipped["method"] == "qlora"
    assert "--quant" in skipped["reason"]
    assert result["rows"][0]["spread"] is None
    assert any("one seed" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "--methods is missing"),
        (("--methods", "lora,lorra"), "'lorra' is not a method."),
        (
            ("--methods", "lora", "--budget-steps", "2", "--budget-minutes", "1"),
            "--budget-steps cannot be used with --budget-minutes",
        ),
        (
            ("--methods", "lora", "--budget-steps", "2", "--max-steps", "3"),
            "--budget-steps cannot be used with --max-steps",
        ),
        (("--methods", "lora", "--max-memory", "0"), "--max-memory 0: expected a number above 0"),
        (("--methods", "ia3", "--lora-r", "4"), "method.r belongs to none of the compared methods"),
        (("--methods", "qlora", "--quant", "none"), "qlora: "),
        (("--methods", "lora", "--search", "lr", "--study", "x.db"), "expected a database URL"),
        (("--methods", "lora", "--trials", "5"), "--trials 5 needs --search lr. Add --search lr"),
    ],
)
def test_invalid_arguments_are_rejected(
    arguments: tuple[str, ...], text: str, rows: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(build_arguments(rows, tmp_path / "runs", *arguments)) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_parallel_searches_share_study_and_best_values(rows: Path, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("matplotlib")
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    arguments = ("--methods", "lora", "--budget-steps", "3", "--search", "lr,r", "--trials", "3",
                 "--study", url, "--json")  # fmt: skip
    their_arguments = build_arguments(rows, tmp_path / "theirs", *arguments)
    process = Forked(their_arguments, stdout=subprocess.PIPE)
    ours = json.loads(forked.run(*build_arguments(rows, tmp_path / "ours", *arguments)).stdout)
    theirs = json.loads(process.communicate(timeout=WAIT)[0])
    (row,) = ours["rows"]
    search = row["search"]
    assert theirs["rows"][0]["search"]["values"] == search["values"]

    study = optuna.load_study(study_name=search["name"], storage=url)
    finished = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    assert len(finished) == search["trials"] == 3  # if both start the last trial, one cancels it
    best = min(trial.value for trial in finished if trial.state.name == "COMPLETE")
    assert search["best"] == best
    assert search["seconds"] > 0
    heading, figures = table_lines(theirs)
    assert heading.endswith("search")
    assert figures.endswith(f"{theirs['rows'][0]['search']['seconds']:,.1f} s")
    assert row["metric"] == pytest.approx(best, rel=1e-4)  # the same run, repeated
    values = search["values"]
    run_config = yaml.safe_load((Path(row["run"]) / "config.yaml").read_text())
    assert run_config["train"]["learning_rate"] == values["train.learning_rate"]
    assert run_config["method"]["r"] == values["method.r"]
    assert f"--set method.r={values['method.r']}" in ours["command"]
    assert not list((tmp_path / "ours" / "search").iterdir())  # trials are removed after scoring

    pictures = {Path(path).name for path in ours["pictures"]}
    names = ("metric-against-memory", "metric-against-time", "loss", "search")
    assert pictures == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for path in map(Path, ours["pictures"]):
        assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_search_names_unknown_setting_and_missing_package(
    rows: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftlevel.extras.compare.search.find_spec", lambda _: None)
    arguments = build_arguments(rows, tmp_path / "runs", "--methods", "lora", "--search", "lr,rr")
    errors = cli.fails(*arguments)
    assert "--search: 'rr' is not a setting that can be searched." in errors
    assert "optuna, which is not installed." in errors
    assert 'pip install "ftlevel[search]"' in errors
