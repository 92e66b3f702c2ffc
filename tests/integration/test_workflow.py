"""A user's workflow: own rows, preview, training, evaluation, prediction, move, merge.

Each step is a function, in the order of `STEPS`. The models are small real ones.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ftlevel.cli.app import run

pytestmark = [pytest.mark.slow]

ISSUES = {
    "refund": ("money back", "refund the order", "I was charged twice", "return the parcel"),
    "login": ("password forgotten", "cannot sign in", "account is locked", "code never arrives"),
    "bug": ("the app crashes", "screen stays black", "a button does nothing", "an error page"),
}
OPENINGS = ("Hello", "Hi", "Please help", "Dear team")
CITIES = ("Lisbon", "Oslo", "Quito", "Hanoi", "New Delhi", "Cape Town", "Lima", "Accra")
PEOPLE = ("Ana Souza", "Per Dahl", "Mina Tran", "Raj Mehta", "Zola Dube", "Inés Rojas")


@dataclass
class Project:
    """Files and results of a workflow.

    Attributes:
        model: name of the pretrained model.
        data: file of the user's rows.
        options: flags that the rows need.
        expected_error: part of the error of a run without the last two flags.
        new: file of rows without answers.
        capture: pytest's capture of stdout and stderr.
        folder: directory of all files; one step moves it.
        answers: predictions of the run for the new rows.
    """

    model: str
    data: str
    options: Sequence[str]
    expected_error: str
    new: str
    capture: pytest.CaptureFixture[str]
    folder: Path
    answers: list[Any] = field(default_factory=list)

    def run_command(self, *command: str, code: int = 0) -> Any:
        """Run a command and return its JSON or its stderr."""
        self.capture.readouterr()
        exit_code = run([*command])
        out, err = self.capture.readouterr()
        assert exit_code == code, err
        return json.loads(out) if "--json" in command and not code else err

    def predict(self, name: str) -> list[Any]:
        """Return the predictions of `name` for the new rows."""
        out = self.folder / "out.jsonl"
        self.run_command("predict", name, "--dataset", str(self.folder / self.new), "--output",
                         str(out),
                         "--max-new-tokens", "8", "--quiet")  # fmt: skip
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        out.unlink()
        return [line["prediction"] for line in lines]


def write_tickets(folder: Path) -> tuple[str, list[str], str, str]:
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
    with (folder / "tickets.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["Ticket ID", "Message text", "Kategorie"], *rows, [], []])
    texts = [[f"{opening}, {ISSUES[kind][2]}"] for opening in OPENINGS for kind in ISSUES]
    with (folder / "new.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["Message text"], *texts])
    options = ["--map", "text=Message text", "--map", "label=Kategorie", "--validation-split",
               "0.2",
               "--on-bad-row", "skip", "--set", "data.gate.label_case=fold"]  # fmt: skip
    return "tickets.csv", options, "labels that differ by case", "new.csv"


def write_names(folder: Path) -> tuple[str, list[str], str, str]:
    """Write tagged people and cities in CoNLL format; one word has no tag."""
    rng = random.Random(2)
    sentences = []
    for number in range(60):
        person, city = rng.choice(PEOPLE).split(), rng.choice(CITIES).split()
        words = [
            *person,
            rng.choice(("moved to", "works in", "left")),
            *city,
            f"in {1990 + number}",
        ]
        tokens = " ".join(words).split()
        tags = ["O"] * len(tokens)
        start = len(tokens) - 2 - len(city)
        tags[: len(person)] = ["B-PER", *["I-PER"] * (len(person) - 1)]
        tags[start : start + len(city)] = ["B-LOC", *["I-LOC"] * (len(city) - 1)]
        lines = [f"{token} {tag}" for token, tag in zip(tokens, tags, strict=True)]
        sentences.append("\n".join(lines if number != 7 else [*lines[:-1], tokens[-1]]))
    text = "-DOCSTART- O\n\n" + "\n\n".join(sentences)
    (folder / "names.conll").write_text(text, encoding="utf-8")
    new = [{"tokens": ["Ana", "Dahl", "left", city.split()[0]]} for city in CITIES]
    (folder / "new.jsonl").write_text("\n".join(map(json.dumps, new)), encoding="utf-8")
    options = ["--validation-split", "0.2", "--on-bad-row", "skip"]
    return "names.conll", options, "drop bad rows with --on-bad-row skip", "new.jsonl"


def write_faq(folder: Path) -> tuple[str, list[str], str, str]:
    """Write questions and answers with custom column names."""
    rows = [
        {"Frage": f"Where does {person} live?", "Antwort": f"{person} lives in {city}."}
        for person, city in zip(PEOPLE * 4, CITIES * 3, strict=True)
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "faq.jsonl").write_text("\n".join(lines), encoding="utf-8")
    new = [{"Frage": f"Where does {person} work?"} for person in PEOPLE[:3]]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in new)
    (folder / "new.jsonl").write_text(text, encoding="utf-8")
    options = ["--set", "model.dtype=float32",  # bfloat16 rounding may change a word
               "--set", "data.gate.conflicting_answers=warn", "--validation-split", "0.2",
               "--max-steps", "6", "--map", "prompt=Frage", "--map",
               "completion=Antwort"]  # fmt: skip
    return "faq.jsonl", options, "--map prompt=Frage", "new.jsonl"


def preview_rows(project: Project) -> None:
    """Preview the rows."""
    preview = project.run_command("preview", "--model", project.model, "--dataset",
                                  project.data, *project.options,
                                  "--json")  # fmt: skip
    assert preview["steps"] > 0


def train(project: Project) -> None:
    """Train; the error without the last flags names the missing one."""
    command = [
        "train",
        "--model",
        project.model,
        "--dataset",
        project.data,
        "--output-dir",
        "my run",
    ]
    assert project.expected_error in project.run_command(
        *command, *project.options[:-2], "--quiet", code=2
    )
    summary = project.run_command(*command, *project.options, "--json")
    assert summary["proof"]["reload_difference"] == 0
    assert summary["loss_last"] < summary["loss_first"]
    best = summary["best"]
    assert best is None or best["best"] == summary["metrics"][best["metric"].removeprefix("eval_")]
    assert [line.split()[:2] for line in summary["next"]] == [
        ["ftlevel", "evaluate"], ["ftlevel", "predict"], ["ftlevel", "merge"],
    ]  # fmt: skip


def evaluate(project: Project) -> None:
    """Evaluate; metrics equal those of the run."""
    summary = project.run_command("evaluate", "my run", "--json", "--resamples", "100")
    trained = json.loads(Path("my run/summary.json").read_text(encoding="utf-8"))["metrics"]
    assert summary["metrics"]["loss"] == pytest.approx(trained["loss"], rel=1e-3)


def predict_new_rows(project: Project) -> None:
    """Predict rows without answers."""
    project.answers = project.predict("my run")
    assert all(project.answers)


def continue_adapter(project: Project) -> None:
    """Train a second run from the adapter; it starts with the metrics of the first."""
    summary = project.run_command("train", "--adapter", "my run", "--dataset", project.data,
                                  *project.options,
                                  "--max-steps", "4", "--eval-on-start", "--output-dir",
                                  "my next run",
                                  "--json")  # fmt: skip
    first = json.loads(Path("my run/summary.json").read_text(encoding="utf-8"))
    assert summary["adapter"]["name"] == "my run"
    assert summary["metrics_before"]["loss"] == pytest.approx(first["metrics"]["loss"], rel=1e-3)


def move_folder(project: Project) -> None:
    """Move the directory; predictions and evaluation stay the same."""
    moved = project.folder.with_name("moved")
    project.folder.rename(moved)
    project.folder = moved
    assert project.predict(str(moved / "my run")) == project.answers
    summary = project.run_command("evaluate", str(moved / "my run"), "--json", "--resamples", "0")
    assert summary["data"]["split"] == "validation"


def merge(project: Project) -> None:
    """Merge; the merged model has the same predictions."""
    out = project.folder / "merged"
    project.run_command(
        "merge", str(project.folder / "my run"), "--out", str(out), "--dtype", "float32", "--quiet"
    )
    assert project.predict(str(out)) == project.answers


STEPS: tuple[Callable[[Project], None], ...] = (
    preview_rows,
    train,
    evaluate,
    predict_new_rows,
    continue_adapter,
    move_folder,
    merge,
)


@pytest.mark.parametrize(
    ("write", "model"),
    [
        (write_tickets, "minilm"),
        pytest.param(write_names, "minilm", marks=pytest.mark.sweep),
        (write_faq, "builtin:tiny-llama"),
    ],
    ids=["classes", "tags in CoNLL", "texts"],
)
@pytest.mark.weights
def test_workflow(
    write: Callable[[Path], tuple[str, list[str], str, str]],
    model: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "the project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    data, options, expected_error, new = write(folder)
    if model == "minilm":
        model = str(request.getfixturevalue(model))
    project = Project(model, data, options, expected_error, new, capsys, folder)
    for step in STEPS:
        step(project)
    assert project.folder.name == "moved", "the last answers came from there"
