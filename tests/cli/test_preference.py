"""Arguments that `train --task preference` rejects before weights load; data checks of pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlevel.cli.app import run

DryRun = Callable[..., tuple[int, str]]
NOUNS = ("parser", "reader", "buffer", "cursor", "socket", "thread", "signal", "window")


def pair(i: int, **changes: Any) -> dict[str, Any]:
    noun, other_noun = NOUNS[i % 8], NOUNS[(i * 3 + 1) % 8]
    good, bad = f"The {noun} keeps {i} {other_noun}s.", f"No {other_noun} has {i} {noun}s."
    bad += " And why should it?" * (i % 2)
    return {"prompt": f"What does the {noun} {i} keep?", "chosen": good, "rejected": bad, **changes}


PAIRS = [pair(i) for i in range(24)]
UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[("chosen", "rejected")[i % 2]], "label": i % 2 == 0}
    for i, row in enumerate(PAIRS)
]


@pytest.fixture
def dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> DryRun:
    """Return a function that runs `ftlevel train --dry-run` on rows: exit code and output."""
    monkeypatch.chdir(tmp_path)

    def run_train(*arguments: str, rows: list[Any] = PAIRS) -> tuple[int, str]:
        lines = "\n".join(json.dumps(row) for row in rows)
        Path("rows.jsonl").write_text(lines, encoding="utf-8")
        command = ["train", "--task", "preference", "--dataset", "rows.jsonl", "--dry-run"]
        code = run([*command, *arguments])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run_train


INVALID_ARGUMENTS = [
    (["--beta", "0"], "--beta: 0.0 is out of range"),
    (["--beta", "-1"], "--beta: -1.0 is out of range"),
    (["--loss", "orpo", "--reference", "none"], "--reference has no effect with --loss orpo"),
    (["--loss", "orpo", "--reference", "run"], "--reference has no effect with --loss orpo"),
    (["--simpo-gamma", "1"], "--simpo-gamma has no effect with --loss dpo: it is for simpo."),
    (["--loss", "simpo", "--sft-weight", "2"], "--sft-weight has no effect with --loss simpo"),
    (
        ["--desirable-weight", "2"],
        "--desirable-weight has no effect with --loss dpo: it is for kto.",
    ),
    (
        ["--label-smoothing", "0.1"],
        "--label-smoothing-factor 0.1 has no effect with --loss dpo: it is",
    ),
    (["--loss", "robust", "--label-smoothing", "0.6"], "Give less than 0.5."),
    (["--loss", "dp"], "Did you mean 'dpo'"),
    (
        ["--task", "text-generation", "--loss", "dpo"],
        "--loss has no effect with --task text-generation: it is for --task preference.",
    ),
    (["--loss", "reward", "--beta", "1"], "--beta has no effect with --loss reward"),
]


@pytest.mark.parametrize(("arguments", "message"), INVALID_ARGUMENTS)
def test_arguments_unused_by_loss_are_rejected(
    arguments: list[str], message: str, dry_run: DryRun
) -> None:
    code, out = dry_run(*arguments)
    assert code == 2
    assert message in out
    assert len(out.strip().splitlines()) == 1


def drop_column(name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != name} for row in PAIRS]


INVALID_ROWS = [
    (PAIRS, ["--reference", "nowhere"], "--reference nowhere: no such directory"),
    (drop_column("rejected"), [], "there is a column 'chosen', and no 'rejected'"),
    ([{"text": "a b c"}] * 4, [], "--task preference: no format matches the columns"),
    ([{**row, "rejected": row["chosen"]} for row in PAIRS], [], "a pair of equal answers: 24 of"),
    ([{**row, "rejected": " "} for row in PAIRS], [], "is empty"),
    (
        UNPAIRED,
        [],
        "--loss dpo needs pairs of answers, and these rows have one rated answer each. Use --loss "
        "kto.",
    ),
    (
        [{**row, "label": True} for row in UNPAIRED],
        ["--loss", "kto"],
        "all answers have the same label",
    ),
]


@pytest.mark.parametrize(("rows", "arguments", "message"), INVALID_ROWS)
def test_rows_without_preferences_are_rejected(
    rows: list[Any], arguments: list[str], message: str, dry_run: DryRun
) -> None:
    code, out = dry_run(*arguments, rows=rows)
    assert code == 2
    assert message in out
    assert "loading the model" not in out


FINDINGS = [
    ([pair(i, chosen=f"It keeps {'very ' * 9}many {NOUNS[i % 8]}s, {i}.") for i in range(24)],
     "a judge of length alone, for the longer one, would be right in 100%"),
    ([*PAIRS, {**PAIRS[0], "chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}],
     "an earlier pair with the answers swapped: 1 of 25"),
    ([pair(i, score_chosen=1, score_rejected=5) for i in range(24)],
     "pairs whose rejected answer has the same score or a better one: 24 of 24"),
    ([*PAIRS, {**PAIRS[0], "prompt": "Again?", "rejected": PAIRS[0]["chosen"]}],
     "a pair of equal answers: 1 of 25 train rows"),
    ([*PAIRS, PAIRS[3]], "the same as an earlier row: 1 of 25"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), FINDINGS)
def test_data_checks_of_pairs(rows: list[Any], message: str, dry_run: DryRun) -> None:
    code, out = dry_run(rows=rows)
    assert code == 0, out
    assert message in out


def test_valid_pairs_pass_checks(dry_run: DryRun) -> None:
    code, out = dry_run("--loss", "cdpo")
    assert code == 0, out
    assert "data check" not in out
    assert "loss: cdpo" in out


def test_preview_shows_prompt_once_and_both_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(PAIRS[0]) + "\n" + json.dumps(PAIRS[1]))
    assert run(["preview", "--task", "preference", "--dataset", "rows.jsonl", "--row", "1"]) == 0
    out = capfd.readouterr().out
    assert out.count("What does the parser") == 1
    assert "=preferred]" in out
    assert "=rejected]" in out


def test_other_tools_loss_flags_are_accepted(dry_run: DryRun) -> None:
    assert dry_run("--pref-loss", "sigmoid", "--pref-beta", "0.2")[0] == 0
    assert dry_run("--loss-type", "ipo")[0] == 0
