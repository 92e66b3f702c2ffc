"""Files as people have them, through the commands: what is taken for what is said, or refused."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftlevel.cli.app import run
from ftlevel.data.formats.turns import MOST_CHARACTERS

ModelDir = Callable[..., Path]
KINDS = ("billing", "technical", "delivery")
TICKETS = "Ticket ID,Subject,Body,Category\n" + "".join(
    f"T-{i},late parcel {i},it came {i} days late,{KINDS[i % 3]}\n" for i in range(12)
)
TALKS = [
    {"dialog": [{"speaker": "Anna", "message": f"how much is {i}?"},
                {"speaker": "Shop", "message": f"it is {i}."}]}
    for i in range(6)
]  # fmt: skip
WHO = ["--map", "user=Anna", "--map", "assistant=Shop"]
CONLL = "-DOCSTART- -X- O\n\n" + "".join(
    f"Mr NN I-PER\nLovelace{i} NN I-PER\nsleeps VB O\n\n" for i in range(6)
)
SPANS = [
    {"text": f"Ada{i} sleeps in Paris.", "label": [[0, 4, "PER"], [15, 20, "LOC"]]}
    for i in range(6)
]  # fmt: skip
PAIRS = [{"translation": {"en": f"the value {i}", "es": f"el valor {i}"}} for i in range(6)]
CLASSES = ["--task", "text-classification", "--model", "bert"]
TAGS = ["--task", "token-classification", "--model", "bert"]
TRANSLATE = ["--task", "translation", "--source-language", "es"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: ModelDir) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").symlink_to(tiny_model_dir("bert"))
    return tmp_path


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "arguments", "said"),
    [
        ("tickets.csv", TICKETS, CLASSES,
         "text from 'Body', label from 'Category'; not used: 'Ticket ID', 'Subject' (by their"),
        ("tickets.csv", TICKETS, [*CLASSES, "--map", "text=subject+body"],
         "text from 'Subject+Body', label from 'Category'; not used: 'Ticket ID' (by --map)"),
        ("tickets.csv", TICKETS.replace(",", ";"), CLASSES, "its header is separated by ';'"),
        ("tickets.csv", TICKETS.partition("\n")[2], [*CLASSES, "--map", "text=3", "--map",
         "label=4"], "no header: 'billing' of line 1 stands in 3 of the rows below too"),
        ("talks.json", json.dumps(TALKS), WHO, "user is 'Anna', assistant is 'Shop'"),
        ("talks.json", json.dumps({"data": TALKS}), WHO, "the rows are the list under 'data'"),
        ("names.conll", CONLL, TAGS, "tags: IO (as in the data)"),
        ("names.txt", CONLL.replace("Mr NN I", "Mr NN B"), TAGS, "tags: IOB2 (as in the data)"),
        ("names.jsonl", jsonl(SPANS), TAGS, "tags: IOB2 (made of the spans)"),
        ("names.jsonl", jsonl(SPANS), ["--model", "bert"], "spans from 'label'"),
        ("names.json", json.dumps([[r["text"], {"entities": r["label"]}] for r in SPANS]), TAGS,
         "text + spans: 'text', spans from 'entities'"),
        ("pairs.jsonl", jsonl(PAIRS), TRANSLATE, "languages: Spanish to English"),
        ("pairs.csv", "id,en,es\n1,the value,el valor\n2,a file,un archivo\n", TRANSLATE,
         "source from 'es', target from 'en'; not used: 'id'"),
    ],
)  # fmt: skip
def test_it_is_read_and_said(
    folder: Path, name: str, content: str, arguments: list[str], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Path(name).write_text(content, encoding="utf-8")
    assert run(["preview", "--dataset", name, *arguments]) == 0
    plain = capsys.readouterr().out
    assert said in plain
    packed = Path(f"{name}.gz")
    packed.write_bytes(gzip.compress(content.encode()))
    assert run(["preview", "--dataset", packed.name, *arguments]) == 0
    assert capsys.readouterr().out.replace(packed.name, name) == plain


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("odd.csv", TICKETS.replace("Body", "What happened").replace("Category", "Queue"), CLASSES,
         "Say which is which: --map 'text=What happened' --map label=Queue."),
        ("talks.json", json.dumps(TALKS), [],
         "talks.json row 1: turn 1 of 'dialog' has the unknown role 'Anna' (known: system, user, "
         "assistant, tool, human, gpt; or say who it is: --map user=Anna, or assistant=…)."),
        ("pairs.jsonl", jsonl(PAIRS), ["--task", "translation"],
         "Add --source-language en --target-language es, or another pair."),
        ("names.jsonl", jsonl([{"text": "Ada sleeps", "entities": [[0, 2, "PER"]]}]), TAGS,
         "names.jsonl:1: 'PER' at 0 to 2 cuts the word 'Ada' ('Ad')."),
        ("text.jsonl", jsonl([{"text": "a" * (MOST_CHARACTERS + 1)}]), [],
         "text.jsonl:1: 'text' has 8,388,609 characters in one text"),
        ("marks.jsonl", jsonl(SPANS), CLASSES,
         "'label' holds spans of characters, which --task token-classification learns"),
        ("page.pdf", "%PDF-1.7", [], "page.pdf: is a document, and ftlevel learns from text."),
        ("rows.jsonl.zst", "no archive", [],
         "rows.jsonl.zst: is named .zst and does not begin like one."),
        ("tickets.csv", TICKETS, [*CLASSES, "--map", "label=Category+Body"],
         "--map label=Category+Body: only texts can be joined. Name one column."),
        ("-", "", ["--output-dir", "run", "--resume"],
         "--resume cannot be used with --dataset -: the rows of the run came through a pipe"),
    ],
)  # fmt: skip
def test_it_is_refused_and_nothing_is_written(
    folder: Path, name: str, content: str, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if name != "-":
        Path(name).write_text(content, encoding="utf-8")
    before = sorted(folder.iterdir())
    assert run(["train", "--quiet", "--dataset", name, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert sorted(folder.iterdir()) == before


def test_rows_of_bad_labels_are_told_apart(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"the value {i}", "label": None if i % 10 == 9 else i % 2} for i in range(60)]
    Path("rows.json").write_text(json.dumps(rows))
    assert run(["train", "--quiet", "--dataset", "rows.json", *CLASSES]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ftlevel: rows.json row 10: 'label' is null."
    assert lines[-1].startswith("ftlevel: rows.json: 6 of 60 rows are bad (the first 5 are above).")


@pytest.mark.parametrize("more", [[], ["--streaming", "--max-steps", "2"]])
def test_stdin_is_previewed(
    folder: Path, more: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    content = jsonl([{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(6)])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
    assert run(["preview", "--dataset", "-", *more]) == 0
    out = capsys.readouterr().out
    assert "stdin:1" in out
    assert "stdin: read as jsonl: its first line is an object" in out


def test_joined_columns_go_through_train_evaluate_and_predict(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("tickets.csv.gz").write_bytes(gzip.compress(TICKETS.encode()))
    assert run(["train", "--quiet", "--dataset", "tickets.csv.gz", *CLASSES, "--map",
                "text=Subject+Body", "--max-steps", "1", "--output-dir", "run"]) == 0  # fmt: skip
    capsys.readouterr()
    assert run(["evaluate", "run", "--split", "train", "--resamples", "0"]) == 0
    assert "text from 'Subject+Body'" in capsys.readouterr().out
    piped = SimpleNamespace(buffer=io.BytesIO(TICKETS.replace(",Category", ",Kind").encode()))
    monkeypatch.setattr("sys.stdin", piped)
    assert run(["predict", "run", "--dataset", "-", "--output", "told.jsonl"]) == 0
    captured = capsys.readouterr()
    assert "text from 'Subject+Body'; not used: 'Ticket ID', 'Kind' (as in training)" in (
        captured.out + captured.err
    )
    assert len(Path("told.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("rows", "arguments", "asked", "said"),
    [
        (PAIRS, TRANSLATE, [{"es": "hola"}], "source from 'es' (as in training)"),
        (TALKS, WHO, TALKS[:1], "user is 'Anna', assistant is 'Shop' (as in training)"),
    ],
)
def test_a_run_asks_rows_by_what_it_was_told(
    folder: Path, tiny_model_dir: ModelDir, rows: list[Any], arguments: list[str],
    asked: list[Any], said: str, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Path("rows.jsonl").write_text(jsonl(rows))
    Path("asked.jsonl").write_text(jsonl(asked))
    model = ["--model", str(tiny_model_dir("llama"))]
    assert run(["train", "--quiet", "--dataset", "rows.jsonl", *model, *arguments, "--max-steps",
                "1", "--output-dir", "run"]) == 0  # fmt: skip
    capsys.readouterr()
    assert run(["predict", "run", "--dataset", "asked.jsonl", "--max-new-tokens", "2",
                "--output", "told.jsonl"]) == 0  # fmt: skip
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
    assert "prediction" in json.loads(Path("told.jsonl").read_text().splitlines()[0])
