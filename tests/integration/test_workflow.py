"""A user's workflow: own rows, preview, training, evaluation, prediction, move, merge.

Each step is a function, in the order of `STEPS`; the real small models answer.
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
class Day:
    """What is done, and what was found out on the way.

    Attributes:
        model: directory of the pretrained model.
        data: file of the user's rows.
        told: flags about the rows, as previews and errors name them.
        refused: what a run without the last of these says.
        new: file of rows without answers.
        capture: what commands print.
        folder: where everything is; it moves.
        answers: what the run said of the new rows.
    """

    model: Path
    data: str
    told: Sequence[str]
    refused: str
    new: str
    capture: pytest.CaptureFixture[str]
    folder: Path
    answers: list[Any] = field(default_factory=list)

    def ask(self, *command: str, code: int = 0) -> Any:
        """Run a command, and return its JSON, or what it complains of."""
        self.capture.readouterr()
        found = run([*command])
        out, err = self.capture.readouterr()
        assert found == code, err
        return json.loads(out) if "--json" in command and not code else err

    def predict(self, name: str) -> list[Any]:
        """Return what `name` says of the new rows."""
        out = self.folder / "out.jsonl"
        self.ask("predict", name, "--dataset", str(self.folder / self.new), "--output", str(out),
                 "--max-new-tokens", "8", "--quiet")  # fmt: skip
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        out.unlink()
        return [line["prediction"] for line in lines]


def tickets(folder: Path) -> tuple[str, list[str], str, str]:
    """Write a messy table: odd names, a BOM, empty cells and lines, a row twice, labels unlike."""
    draw = random.Random(1)
    rows: list[list[Any]] = []
    for number in range(90):
        kind = draw.choice(list(ISSUES))
        text = f"{draw.choice(OPENINGS)}, {draw.choice(ISSUES[kind])} on device {number}"
        rows.append([number, text, kind])
    rows[5][2] = rows[5][2].upper()
    rows[9][2] = f" {rows[9][2]} "
    rows += [[90, *rows[3][1:]], [91, "", "bug"], [92, "Hello there", ""]]
    with (folder / "tickets.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["Ticket ID", "Message text", "Kategorie"], *rows, [], []])
    texts = [[f"{opening}, {ISSUES[kind][2]}"] for opening in OPENINGS for kind in ISSUES]
    with (folder / "new.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["Message text"], *texts])
    told = ["--map", "text=Message text", "--map", "label=Kategorie", "--validation-split", "0.2",
            "--on-bad-row", "skip", "--set", "data.gate.label_case=fold"]  # fmt: skip
    return "tickets.csv", told, "labels that differ by case", "new.csv"


def names(folder: Path) -> tuple[str, list[str], str, str]:
    """Write tagged people and places as CoNLL has them; one word has no tag."""
    draw = random.Random(2)
    sentences = []
    for number in range(60):
        person, city = draw.choice(PEOPLE).split(), draw.choice(CITIES).split()
        words = [
            *person,
            draw.choice(("moved to", "works in", "left")),
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
    told = ["--validation-split", "0.2", "--on-bad-row", "skip"]
    return "names.conll", told, "drop bad rows with --on-bad-row skip", "new.jsonl"


def replies(folder: Path) -> tuple[str, list[str], str, str]:
    """Write questions and answers under names of the user's own."""
    rows = [
        {"Frage": f"Where does {person} live?", "Antwort": f"{person} lives in {city}."}
        for person, city in zip(PEOPLE * 4, CITIES * 3, strict=True)
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "faq.jsonl").write_text("\n".join(lines), encoding="utf-8")
    new = [{"Frage": f"Where does {person} work?"} for person in PEOPLE[:3]]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in new)
    (folder / "new.jsonl").write_text(text, encoding="utf-8")
    told = ["--set", "model.dtype=float32",  # a word may hang on how bfloat16 is rounded
            "--set", "data.gate.conflicting_answers=warn", "--validation-split", "0.2",
            "--max-steps", "6", "--map", "prompt=Frage", "--map", "completion=Antwort"]  # fmt: skip
    return "faq.jsonl", told, "--map prompt=Frage", "new.jsonl"


def look_at_the_rows(day: Day) -> None:
    """A preview shows what a run would make of the rows."""
    found = day.ask("preview", "--model", str(day.model), "--dataset", day.data, *day.told,
                    "--json")  # fmt: skip
    assert found["steps"] > 0


def train(day: Day) -> None:
    """What is wrong is said with the flag that helps, and then a run needs no other."""
    command = ["train", "--model", str(day.model), "--dataset", day.data, "--output-dir", "my run"]
    assert day.refused in day.ask(*command, *day.told[:-2], "--quiet", code=2)
    found = day.ask(*command, *day.told, "--json")
    assert found["proof"]["reload_difference"] == 0
    assert found["loss_last"] < found["loss_first"]
    best = found["best"]
    assert best is None or best["best"] == found["metrics"][best["metric"].removeprefix("eval_")]
    assert [line.split()[:2] for line in found["next"]] == [
        ["ftlevel", "evaluate"], ["ftlevel", "predict"], ["ftlevel", "merge"],
    ]  # fmt: skip


def evaluate(day: Day) -> None:
    """The scores are those of the run."""
    found = day.ask("evaluate", "my run", "--json", "--resamples", "100")
    trained = json.loads(Path("my run/summary.json").read_text(encoding="utf-8"))["metrics"]
    assert found["metrics"]["loss"] == pytest.approx(trained["loss"], rel=1e-3)


def predict_new_rows(day: Day) -> None:
    """Rows without an answer get one each."""
    day.answers = day.predict("my run")
    assert all(day.answers)


def go_on_from_the_adapter(day: Day) -> None:
    """A second run begins where the first has ended, and knows what it was told."""
    found = day.ask("train", "--adapter", "my run", "--dataset", day.data, *day.told,
                    "--max-steps", "4", "--eval-on-start", "--output-dir", "my next run",
                    "--json")  # fmt: skip
    first = json.loads(Path("my run/summary.json").read_text(encoding="utf-8"))
    assert found["adapter"]["name"] == "my run"
    assert found["metrics_before"]["loss"] == pytest.approx(first["metrics"]["loss"], rel=1e-3)


def move_the_folder(day: Day) -> None:
    """Everything goes on from another place and another directory."""
    moved = day.folder.with_name("moved")
    day.folder.rename(moved)
    day.folder = moved
    assert day.predict(str(moved / "my run")) == day.answers
    found = day.ask("evaluate", str(moved / "my run"), "--json", "--resamples", "0")
    assert found["data"]["split"] == "validation"


def merge(day: Day) -> None:
    """A plain model says the same."""
    out = day.folder / "merged"
    day.ask("merge", str(day.folder / "my run"), "--out", str(out), "--dtype", "float32", "--quiet")
    assert day.predict(str(out)) == day.answers


STEPS: tuple[Callable[[Day], None], ...] = (
    look_at_the_rows,
    train,
    evaluate,
    predict_new_rows,
    go_on_from_the_adapter,
    move_the_folder,
    merge,
)


@pytest.mark.parametrize(
    ("write", "model"),
    [
        (tickets, "minilm"),
        pytest.param(names, "minilm", marks=pytest.mark.sweep),
        (replies, "first_blocks"),
    ],
    ids=["classes", "tags in CoNLL", "texts"],
)
@pytest.mark.weights
def test_a_day(
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
    data, told, refused, new = write(folder)
    day = Day(request.getfixturevalue(model), data, told, refused, new, capsys, folder)
    for step in STEPS:
        step(day)
    assert day.folder.name == "moved", "the last answers came from there"
