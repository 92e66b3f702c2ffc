"""JSON files with one object, one-line arrays, and tables without header or with semicolons."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ftlevel.data.sources.readers import load_table
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError

ROWS = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
BY_COLUMN = {"text": ["a", "b"], "label": [1, 0]}
SQUAD = {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "It is red.", "qas": [
    {"id": "1", "question": "Which?", "answers": [{"text": "red", "answer_start": 6}]},
    {"id": "2", "question": "No?", "is_impossible": True, "answers": []}, {"id": "3"},
]}]}]}  # fmt: skip


def read(folder: Path, content: Any, name: str = "x.json", on_bad_row: Any = "error") -> Table:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return load_table(path, on_bad_row)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"data": ROWS}, "the rows are the list under 'data'"),
        ({"version": 3, "examples": ROWS, "tags": []}, "the list under 'examples'"),
        (BY_COLUMN, "one column per key, as pandas writes them"),
        ({k: {str(i): v for i, v in enumerate(c)} for k, c in BY_COLUMN.items()}, "as pandas"),
        ({"columns": ["text", "label"], "index": [0, 1], "data": [["a", 1], ["b", 0]]},
         "as pandas"),
    ],
)  # fmt: skip
def test_single_object_is_converted_to_rows(content, note, indent, tmp_path):
    table = read(tmp_path, json.dumps(content, indent=indent))
    assert list(table.rows) == ROWS
    assert note in table.notes[0]
    assert table.notes[0].startswith(f"{tmp_path}/x.json: ")


def test_wrapped_list_errors_name_line(tmp_path):
    content = '{\n "data": [\n  {"text": "a"},\n  7\n ]\n}'
    with pytest.raises(InputError, match=r"x\.json:4: a number, where one object"):
        read(tmp_path, content)


def test_squad_has_one_row_per_question(tmp_path):
    table = read(tmp_path, SQUAD, on_bad_row="skip")
    assert table.rows[0] == {
        "id": "1", "title": "T", "context": "It is red.", "question": "Which?",
        "answers": {"text": ["red"], "answer_start": [6]},
    }  # fmt: skip
    assert table.rows[1]["answers"] == {"text": [], "answer_start": []}
    assert table.dropped[0].message == "question 3 lacks 'answers'"


@pytest.mark.parametrize(
    "row",
    [{"text": "a", "label": 1}, {"messages": [{"role": "user", "content": "q"}]},
     {"tokens": ["a", "b"], "tags": ["O", "O"]}],
)  # fmt: skip
def test_single_row_object_is_one_row(row, tmp_path):
    assert list(read(tmp_path, row).rows) == [row]


def test_one_line_array_errors_name_row(tmp_path):
    content = [*ROWS, 7, *ROWS, {"text": None}]
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    assert error.value.problems == [
        f"{tmp_path}/x.json row 3: a number, where one object with named columns is expected.",
        f"{tmp_path}/x.json row 6: lacks 'label', which the 4 other rows have (a value may be "
        "null, the key must be there).",
        f"{tmp_path}/x.json: 2 of 6 rows are bad. Fix them, or drop bad rows with --on-bad-row "
        "skip.",
    ]
    table = read(tmp_path, content, on_bad_row="skip")
    assert (len(table), table.lines) == (4, [1, 2, 4, 5])
    assert table.where(3) == f"{tmp_path}/x.json row 5"


def test_spacy_pairs_are_converted_to_rows(tmp_path):
    pair = ["Ada", {"entities": [[0, 3, "PER"]]}]
    row = {"text": "Ada", "entities": [[0, 3, "PER"]]}
    assert list(read(tmp_path, [pair, pair]).rows) == [row, row]
    line = json.dumps(pair) + "\n"
    assert list(read(tmp_path, line * 2, "x.jsonl").rows) == [row, row]
    large = read(tmp_path, line * 40_000, "large.jsonl")
    assert (len(large), large.rows[39_999]) == (40_000, row)


HEADERLESS = [
    (
        "great\tpos\nbad film\tneg\nfine\tpos\nok\tpos\n",
        "x.tsv",
        "'pos' of line 1 also occurs in 2",
    ),
    ("1,great film\n0,bad film\n1,ok\n", "x.csv", "column 1 of line 1, '1', is a number"),
    ("1;great, film\n0;bad film\n1;ok\n", "x.csv", "is a number as in the rows below"),
]


@pytest.mark.parametrize(("content", "name", "note"), HEADERLESS)
def test_table_without_header_has_numbered_columns(content, name, note, tmp_path):
    table = read(tmp_path, content, name)
    assert table.column_names == ["1", "2"]
    assert len(table) == content.count("\n")
    assert table.lines[0] == 1
    assert note in table.notes[-1]


@pytest.mark.parametrize(
    "content",
    ["0,1\na,1\nb,2\n", "question,A,B,answer\nq,x,y,A\nr,x,y,A\n",
     "text,label\ntext,label\na,b\ntext,label\n"],
)  # fmt: skip
def test_header_is_not_mistaken_for_a_row(content, tmp_path):
    table = read(tmp_path, content, "x.csv")
    assert table.column_names == content.partition("\n")[0].split(",")


def test_semicolon_separator_is_detected_and_reported(tmp_path):
    table = read(tmp_path, "text;label\na, b;x\nc;y\n", "x.csv")
    assert list(table.rows) == [{"text": "a, b", "label": "x"}, {"text": "c", "label": "y"}]
    assert "its header is separated by ';'" in table.notes[0]


def test_column_names_of_pandas_are_distinct_strings(tmp_path):
    content: dict[str, Any] = {"columns": [0, 1], "index": [0, 1], "data": [["a", 1], ["b", 0]]}
    assert list(read(tmp_path, content).rows) == [{"0": "a", "1": 1}, {"0": "b", "1": 0}]
    content["columns"] = ["a", "a"]
    with pytest.raises(InputError, match=r"is expected\. Give each of its columns another name\."):
        read(tmp_path, content)


def test_lone_surrogates_in_one_object_are_bad_rows(tmp_path):
    content = {"text": ["a", "b\ud83d"], "label": [1, 0]}
    with pytest.raises(InputError, match=r"x\.json row 2: half of a surrogate pair"):
        read(tmp_path, content)
    assert list(read(tmp_path, content, on_bad_row="skip").rows) == ROWS[:1]


def test_time_to_read_one_object_is_linear(tmp_path):
    content = {"text": [f"{i} " * 100 for i in range(4000)], "label": [0, 1] * 2000}
    start_time = time.process_time()
    assert len(read(tmp_path, content)) == 4000
    assert time.process_time() - start_time < 2, "20 s if each row searches the whole text"
