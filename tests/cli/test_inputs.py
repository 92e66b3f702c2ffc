"""User data files through the commands: column detection, reported choices, and errors."""

from __future__ import annotations

import gzip
import io
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import Cli
from ftlevel.data.formats.turns import MAX_CHARACTERS
from run_files import ModelDir

CATEGORIES = ("billing", "technical", "delivery")
TICKETS = "Ticket ID,Subject,Body,Category\n" + "".join(
    f"T-{i},late parcel {i},it came {i} days late,{CATEGORIES[i % 3]}\n" for i in range(12)
)
CHATS = [
    {"dialog": [{"speaker": "Anna", "message": f"how much is {i}?"},
                {"speaker": "Shop", "message": f"it is {i}."}]}
    for i in range(6)
]  # fmt: skip
ROLE_MAP = ["--map", "user=Anna", "--map", "assistant=Shop"]
CONLL = "-DOCSTART- -X- O\n\n" + "".join(
    f"Mr NN I-PER\nLovelace{i} NN I-PER\nsleeps VB O\n\n" for i in range(6)
)
SPANS = [
    {"text": f"Ada{i} sleeps in Paris.", "label": [[0, 4, "PER"], [15, 20, "LOC"]]}
    for i in range(6)
]  # fmt: skip
PAIRS = [{"translation": {"en": f"the value {i}", "es": f"el valor {i}"}} for i in range(6)]
PICTURES = [{"image": f"{i}.png", "text": f"cat {i}", "label": "ab"[i % 2]} for i in range(6)]
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
    ("name", "content", "arguments", "message"),
    [
        ("tickets.csv", TICKETS, CLASSES,
         "text from 'Body', label from 'Category'; not used: 'Ticket ID', 'Subject' (found by"),
        ("tickets.csv", TICKETS, [*CLASSES, "--map", "text=subject+body"],
         "text from 'Subject+Body', label from 'Category'; not used: 'Ticket ID' (by --map)"),
        ("tickets.csv", TICKETS.replace(",", ";"), CLASSES, "its header is separated by ';'"),
        ("tickets.csv", TICKETS.partition("\n")[2], [*CLASSES, "--map", "text=3", "--map",
         "label=4"], "no header: 'billing' of line 1 also occurs in 3 of the rows below"),
        ("talks.json", json.dumps(CHATS), ROLE_MAP, "user is 'Anna', assistant is 'Shop'"),
        ("talks.json", json.dumps({"data": CHATS}), ROLE_MAP, "the rows are the list under 'data'"),
        ("names.conll", CONLL, TAGS, "tags: IO (as in the data)"),
        ("names.txt", CONLL.replace("Mr NN I", "Mr NN B"), TAGS, "tags: IOB2 (as in the data)"),
        ("names.jsonl", jsonl(SPANS), TAGS, "tags: IOB2 (made of the spans)"),
        ("names.jsonl", jsonl(SPANS), ["--model", "bert"], "spans from 'label'"),
        ("names.json", json.dumps([[r["text"], {"entities": r["label"]}] for r in SPANS]), TAGS,
         "text + spans: 'text', spans from 'entities'"),
        ("pairs.jsonl", jsonl(PAIRS), TRANSLATE, "languages: Spanish to English"),
        ("pairs.csv", "id,en,es\n1,the value,el valor\n2,a file,un archivo\n", TRANSLATE,
         "source from 'es', target from 'en'; not used: 'id'"),
        ("pictures.jsonl", jsonl(PICTURES), [*CLASSES, "--ignore-columns", "image"],
         "columns: text + label: 'text', 'label'"),
    ],
)  # fmt: skip
def test_detected_columns_are_reported(
    folder: Path, name: str, content: str, arguments: list[str], message: str, cli: Cli
) -> None:
    Path(name).write_text(content, encoding="utf-8")
    output = cli(f"preview --dataset {name}", *arguments)
    assert message in output
    compressed = Path(f"{name}.gz")
    compressed.write_bytes(gzip.compress(content.encode()))
    assert (
        cli(f"preview --dataset {compressed.name}", *arguments).replace(compressed.name, name)
        == output
    )


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("odd.csv", TICKETS.replace("Body", "What happened").replace("Category", "Queue"), CLASSES,
         "Map the columns: --map 'text=What happened' --map label=Queue."),
        ("talks.json", json.dumps(CHATS), [],
         "talks.json row 1: turn 1 of 'dialog' has the unknown role 'Anna' (known: system, user, "
         "assistant, tool, human, gpt; or map it: --map user=Anna, or assistant=…)."),
        ("pairs.jsonl", jsonl(PAIRS), ["--task", "translation"],
         "Add --source-language en --target-language es, or another pair."),
        ("names.jsonl", jsonl([{"text": "Ada sleeps", "entities": [[0, 2, "PER"]]}]), TAGS,
         "names.jsonl:1: 'PER' at 0 to 2 cuts the word 'Ada' ('Ad')."),
        ("text.jsonl", jsonl([{"text": "a" * (MAX_CHARACTERS + 1)}]), [],
         "text.jsonl:1: 'text' has 8,388,609 characters in one text"),
        ("marks.jsonl", jsonl(SPANS), CLASSES,
         "'label' holds spans of characters, which are for --task token-classification, not "
         "--task"),
        ("page.pdf", "%PDF-1.7", [], "page.pdf: is a document, and ftlevel trains on text."),
        ("rows.jsonl.zst", "no archive", [],
         "rows.jsonl.zst: is named .zst and does not begin like one."),
        ("tickets.csv", TICKETS, [*CLASSES, "--map", "label=Category+Body"],
         "--map label=Category+Body: only texts can be joined. Name one column."),
        ("pictures.jsonl", jsonl(PICTURES), [],
         "pictures.jsonl: column 'image' holds images, and ftlevel trains on text only. To "
         "leave it out and use the other columns: --ignore-columns image."),
        ("pictures.jsonl", jsonl(PICTURES), ["--ignore-columns", "image,imge"],
         "--ignore-columns imge: no such column. Columns: 'text', 'label'."),
        ("-", "", ["--output-dir", "run", "--resume"],
         "--resume cannot be used with --dataset -: the rows came through a pipe"),
    ],
)  # fmt: skip
def test_invalid_input_is_rejected_and_nothing_is_written(
    folder: Path, name: str, content: str, arguments: list[str], message: str, cli: Cli
) -> None:
    if name != "-":
        Path(name).write_text(content, encoding="utf-8")
    before = sorted(folder.iterdir())
    captured = cli.run(f"train --quiet --dataset {name}", *arguments, code=2)
    assert message in captured.err
    assert captured.out == ""
    assert sorted(folder.iterdir()) == before


def test_rows_with_null_labels_are_reported(folder: Path, cli: Cli) -> None:
    rows = [{"text": f"the value {i}", "label": None if i % 10 == 9 else i % 2} for i in range(60)]
    Path("rows.json").write_text(json.dumps(rows))
    lines = cli.fails("train --quiet --dataset rows.json", *CLASSES).splitlines()
    assert lines[0] == "ftlevel: rows.json row 10: 'label' is null."
    assert lines[-1].startswith("ftlevel: rows.json: 6 of 60 rows are bad (the first 5 are above).")


def test_preview_reads_stdin(folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    content = jsonl([{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(6)])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
    out = cli("preview --dataset -")
    assert "stdin:1" in out
    assert "stdin: read as jsonl: its first line is an object" in out


def test_joined_columns_in_train_evaluate_and_predict(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("tickets.csv.gz").write_bytes(gzip.compress(TICKETS.encode()))
    cli(
        "train --quiet --dataset tickets.csv.gz",
        *CLASSES,
        "--map text=Subject+Body --max-steps 1 --output-dir run",
    )
    assert "text from 'Subject+Body'" in cli("evaluate run --split train --resamples 0")
    piped = SimpleNamespace(buffer=io.BytesIO(TICKETS.replace(",Category", ",Kind").encode()))
    monkeypatch.setattr("sys.stdin", piped)
    captured = cli.run("predict run --dataset - --output told.jsonl")
    assert "text from 'Subject+Body'; not used: 'Ticket ID', 'Kind' (as in training)" in (
        captured.out + captured.err
    )
    assert len(Path("told.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("rows", "arguments", "queries", "message"),
    [
        (PAIRS, TRANSLATE, [{"es": "hola"}], "source from 'es' (as in training)"),
        (CHATS, ROLE_MAP, CHATS[:1], "user is 'Anna', assistant is 'Shop' (as in training)"),
    ],
)
def test_predict_uses_training_column_map(
    folder: Path, tiny_model_dir: ModelDir, rows: list[Any], arguments: list[str],
    queries: list[Any], message: str, cli: Cli,
) -> None:  # fmt: skip
    Path("rows.jsonl").write_text(jsonl(rows))
    Path("asked.jsonl").write_text(jsonl(queries))
    model = ["--model", str(tiny_model_dir("llama"))]
    cli("train --quiet --dataset rows.jsonl", *model, *arguments, "--max-steps 1 --output-dir run")
    captured = cli.run("predict run --dataset asked.jsonl --max-new-tokens 2 --output told.jsonl")
    assert message in captured.out + captured.err
    assert "prediction" in json.loads(Path("told.jsonl").read_text().splitlines()[0])


def test_columns_ignored_in_training_are_ignored_later(folder: Path, cli: Cli) -> None:
    Path("pictures.jsonl").write_text(jsonl(PICTURES))
    Path("texts.jsonl").write_text(jsonl([{k: r[k] for k in ("text", "label")} for r in PICTURES]))
    train = ["train", "--quiet", *CLASSES, "--max-steps", "1"]
    cli(*train, "--dataset pictures.jsonl --ignore-columns image --output-dir run")
    cli(*train, "--dataset texts.jsonl --output-dir other")
    arguments = ["--dataset", "pictures.jsonl", "--output"]
    cli("predict run", *arguments, "told.jsonl")
    assert json.loads(Path("told.jsonl").read_text().splitlines()[0])["image"] == "0.png"
    cli("evaluate run --split train --resamples 0")
    cli("evaluate run --dataset texts.jsonl --resamples 0")
    for command in (["predict", "other", *arguments, "more.jsonl"],
                    ["evaluate", "other", "--dataset", "pictures.jsonl"]):  # fmt: skip
        assert "pictures.jsonl: column 'image' holds images" in cli.fails(*command)
    cli("predict other --ignore-columns image", *arguments, "more.jsonl")
    cli("evaluate other --dataset pictures.jsonl --resamples 0 --ignore-columns image")


def test_glob_pattern_in_train_evaluate_and_predict(folder: Path, cli: Cli) -> None:
    head, *lines = TICKETS.splitlines()
    for name, part in (("a", lines[:6]), ("b", lines[6:])):
        Path(f"{name}.csv").write_text("\n".join([head, *part]) + "\n")
    arguments = [*CLASSES, "--map", "text=Body", "--validation-file", "?.csv"]
    cli(
        "train --quiet --dataset *.csv",
        *arguments,
        "--max-steps 1 --set data.gate.leaked=warn --output-dir run",
    )
    assert json.loads(Path("run/summary.json").read_text())["data"]["train_rows"] == 12
    cli("evaluate run --resamples 0")
    cli("predict run --dataset *.csv --output told.jsonl")
    ticket_ids = [
        json.loads(line)["Ticket ID"] for line in Path("told.jsonl").read_text().splitlines()
    ]
    assert ticket_ids == [f"T-{i}" for i in range(12)]
    Path("c.csv").write_text("text\nhello\n")
    error = cli.fails("predict run --dataset *.csv")
    assert "c.csv: has the columns 'text', and a.csv has 'Ticket ID'" in error


def test_run_from_pipe_resumes_only_with_same_rows(
    folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftlevel.data.sources.lines.WRITER_SECONDS", 0.2)

    def pipe(name: str, content: str) -> str:
        os.mkfifo(name)
        threading.Thread(target=Path(name).write_text, args=(content,), daemon=True).start()
        return name

    train = ["train", "--quiet", *CLASSES, "--map", "text=Body", "--save-steps", "1",
             "--output-dir", "run", "--max-steps"]  # fmt: skip
    cli(*train, "1", "--dataset", pipe("rows", TICKETS))
    cli(*train, "2", "--resume --dataset", pipe("again", TICKETS))
    changed = pipe("other", TICKETS.replace("late", "soon"))
    error = cli.fails(*train, "3", f"--resume --dataset {changed}")
    assert "not the same run: data.dataset was" in error
    Path("again").unlink()
    os.mkfifo("again")  # nobody writes to it
    error = cli.fails(*train, "3", "--resume --dataset again")
    assert "is a pipe to which no program has written" in error
    error = cli.fails(*train, "3", "--num-processes 2 --dataset again")
    assert (
        "--num-processes cannot be used with --dataset again: only one process can read a pipe"
        in error
    )
