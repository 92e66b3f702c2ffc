"""`ftlevel runs`: runs with their results, and the removal of old checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import Cli
from ftlevel.cli.app import run
from run_files import read_summary

pytestmark = pytest.mark.usefixtures("work_dir")


def train(out: str, *options: str) -> None:
    assert run(["train", "--max-samples", "32", "--output-dir", out, "--quiet", *options]) == 0


def checkpoints(out: str) -> set[str]:
    return {path.name for path in Path(out, "checkpoints").iterdir() if path.is_dir()}


def test_runs_are_listed_and_old_checkpoints_removed(cli: Cli) -> None:
    best = ["--validation-split", "0.2", "--eval-steps", "1", "--metric-for-best-model", "loss",
            "--greater-is-better"]  # fmt: skip
    train("runs/one", "--max-steps", "4", "--save-steps", "1", "--save-total-limit", "9", *best)
    summary = read_summary("runs/one")
    assert summary["best"]["best_step"] == 1
    Path("runs/notes").mkdir()
    Path("elsewhere").mkdir()
    Path("runs/link").symlink_to(Path("elsewhere"))
    [row] = cli.json("runs --json")["runs"]
    assert row == {
        "run": "runs/one", "task": "text-generation", "base": "builtin:tiny-llama",
        "method": "lora", "result": f"perplexity {summary['metrics']['perplexity']:.4f}",
    }  # fmt: skip
    assert cli.json("runs runs/one --json")["runs"] == [row]
    head, line = cli("runs").splitlines()
    assert head.split() == ["run", "task", "base", "method", "result"]
    assert line.split()[:5] == [*list(row.values())[:4], "perplexity"]
    before = checkpoints("runs/one")
    assert "Add --yes" in cli.fails("runs clean")
    assert checkpoints("runs/one") == before
    assert "removed 2 checkpoints" in cli("runs clean --yes")
    assert before - checkpoints("runs/one") == {"checkpoint-2", "checkpoint-3"}
    cli("train --resume --output-dir runs/one --quiet")
    assert "nothing has no run" in cli.fails("runs nothing")


def test_clean_asks_first(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    train("runs/one", "--max-steps", "3", "--save-steps", "1", "--save-total-limit", "9")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)

    def refuse(question: str, *, abort: bool) -> None:
        assert "Remove 2 checkpoints" in question
        assert abort
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.confirm", refuse)
    cli.fails("runs clean", code=130)
    assert {"checkpoint-1", "checkpoint-2", "checkpoint-3"} <= checkpoints("runs/one")


def test_unfinished_and_damaged_runs_are_listed(cli: Cli) -> None:
    train("runs/one", "--max-steps", "2", "--save-steps", "1")
    Path("runs/one/summary.json").unlink()
    assert cli.json("runs --json")["runs"][0]["result"] == "unfinished, checkpoint of step 2"
    Path("runs/one/config.yaml").write_text("task: [")
    assert (
        cli.json("runs --json")["runs"][0]["result"] == "config.yaml or summary.json cannot be read"
    )


def test_log_file_has_the_output_and_the_error(cli: Cli) -> None:
    command = "train --output-dir run --log-file"
    output = cli(command, "train.log", "--max-samples 32 --quiet --max-steps 2")
    assert output == "", "--quiet is for the screen"
    text = Path("train.log").read_text()
    assert "step 2/2" in text
    assert "saved run: adapter" in text
    cli.fails(command, "train.log")
    added = Path("train.log").read_text().removeprefix(text)
    assert "ftlevel: --output-dir run" in added
    error = cli.fails(command, "missing/train.log")
    assert "--log-file missing/train.log: No such file or directory" in error
