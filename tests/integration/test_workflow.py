"""A user's workflow: own rows, preview, training, evaluation, prediction, move, merge."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from command_line import Cli
from run_files import read_rows, read_summary

ISSUES = {
    "refund": ("money back", "refund the order", "I was charged twice", "return the parcel"),
    "login": ("password forgotten", "cannot sign in", "account is locked", "code never arrives"),
    "bug": ("the app crashes", "screen stays black", "a button does nothing", "an error page"),
}
OPENINGS = ("Hello", "Hi", "Please help", "Dear team")
CITIES = ("Lisbon", "Oslo", "Quito", "Hanoi", "New Delhi", "Cape Town", "Lima", "Accra")
PEOPLE = ("Ana Souza", "Per Dahl", "Mina Tran", "Raj Mehta", "Zola Dube", "Inés Rojas")


def write_tickets() -> None:
    """Write a CSV with odd names, a BOM, empty cells and lines, a duplicate and mixed labels."""
    rng = random.Random(1)
    rows: list[list[Any]] = []
    for number in range(90):
        kind = rng.choice(list(ISSUES))
        text = f"{rng.choice(OPENINGS)}, {rng.choice(ISSUES[kind])} on device {number}"
        rows.append([number, text, kind])
    rows[5][2] = rows[5][2].upper()
    rows[9][2] = f" {rows[9][2]} "
    rows += [[90, *rows[3][1:]], [91, "", "bug"], [92, "Hello there", ""]]
    with Path("tickets.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["Ticket ID", "Message text", "Kategorie"], *rows, [], []])
    texts = [[f"{opening}, {ISSUES[kind][2]}"] for opening in OPENINGS for kind in ISSUES]
    with Path("new.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["Message text"], *texts])


def write_faq() -> None:
    """Write questions and answers with custom column names."""
    rows = [
        {"Frage": f"Where does {person} live?", "Antwort": f"{person} lives in {city}."}
        for person, city in zip(PEOPLE * 4, CITIES * 3, strict=True)
    ]
    new = [{"Frage": f"Where does {person} work?"} for person in PEOPLE[:3]]
    for name, lines in (("faq", rows), ("new", new)):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in lines)
        Path(f"{name}.jsonl").write_text(text, encoding="utf-8")


TICKETS = ["--map", "text=Message text", "--map", "label=Kategorie", "--validation-split", "0.2",
           "--on-bad-row", "skip", "--set", "data.gate.label_case=fold"]  # fmt: skip
FAQ = ["--set", "model.dtype=float32",  # bfloat16 rounding may change a word
       "--set", "data.gate.conflicting_answers=warn", "--validation-split", "0.2", "--max-steps",
       "6", "--map", "prompt=Frage", "--map", "completion=Antwort"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize(
    ("data", "new", "model", "options", "error_without_last_flags"),
    [("tickets.csv", "new.csv", "minilm", TICKETS, "labels that differ by case"),
     ("faq.jsonl", "new.jsonl", "builtin:tiny-llama", FAQ, "--map prompt=Frage")],
)  # fmt: skip
def test_workflow(
    data: str, new: str, model: str, options: list[str], error_without_last_flags: str,
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli,
) -> None:  # fmt: skip
    folder = tmp_path / "the project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_tickets() if model == "minilm" else write_faq()
    if model == "minilm":
        model = str(request.getfixturevalue(model))

    def predict(name: Path | str) -> list[Any]:
        out = tmp_path / "out.jsonl"
        cli("predict", name, "--dataset", folder / new, f"--output {out} --max-new-tokens 8 -q")
        answers = [row["prediction"] for row in read_rows(out)]
        out.unlink()
        return answers

    rows = ["--model", model, "--dataset", data, *options]
    assert cli.json("preview --json", *rows)["steps"] > 0
    command = ["train", "--output-dir", "my run", *rows]
    assert error_without_last_flags in cli.fails(*command[:-2], "--quiet")
    summary = cli.json(*command, "--json")
    assert summary["proof"]["reload_difference"] == 0
    assert summary["loss_last"] < summary["loss_first"]
    best = summary["best"]
    assert best is None or best["best"] == summary["metrics"][best["metric"].removeprefix("eval_")]
    next_commands = [line.split()[:2] for line in summary["next"]]
    assert next_commands == [["ftlevel", name] for name in ("evaluate", "predict", "merge")]
    trained_loss = pytest.approx(read_summary("my run")["metrics"]["loss"], rel=1e-3)
    assert cli.json("evaluate 'my run' --json --resamples 100")["metrics"]["loss"] == trained_loss
    answers = predict("my run")
    assert all(answers)
    summary = cli.json("train --json", "--adapter", "my run", *rows[2:], "--max-steps 4",
                       "--eval-on-start", "--output-dir", "my next run")  # fmt: skip
    assert summary["adapter"]["name"] == "my run"
    assert summary["metrics_before"]["loss"] == trained_loss
    folder = folder.rename(tmp_path / "moved")
    assert predict(folder / "my run") == answers
    summary = cli.json("evaluate", folder / "my run", "--json --resamples 0")
    assert summary["data"]["split"] == "validation"
    cli("merge", folder / "my run", f"--out {folder / 'merged'} --dtype float32 --quiet")
    assert predict(folder / "merged") == answers
