"""Reading files: rows of valid files, skipped rows, and roundtrips."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftlevel.data.sources.readers import load_table
from ftlevel.data.sources.table import BadRow, describe_dropped
from ftlevel.errors import InputError

GOOD = '{"text": "a", "n": 1}\n'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_bad_row_is_skipped_and_counted(tmp_path):
    content = GOOD * 3 + '{"txt": "a", "n": 1}\n' + '{"text": 5, "n": 1}\n' + "oops\n" + GOOD
    table = load_table(write(tmp_path, "x.jsonl", content), "skip")
    assert table.lines == [1, 2, 3, 7]
    assert table.rows == [json.loads(GOOD)] * 4
    assert [row.line for row in table.dropped] == [4, 5, 6]
    assert table.dropped[2] == BadRow(6, "not valid JSON (Expecting value, column 1)")
    (note,) = describe_dropped(table)
    assert note.startswith(f"{table.source}: dropped 3 of 7 rows (line 4: lacks 'text' and has")


def test_two_faults_in_one_row_count_once(tmp_path):
    path = write(tmp_path, "x.jsonl", GOOD * 2 + '{"text": 5, "n": "a"}\n')
    table = load_table(path, "skip")
    assert describe_dropped(table)[0].startswith(f"{path}: dropped 1 of 3 rows")
    with pytest.raises(InputError, match=r"1 of 3 rows are bad"):
        load_table(path)


def test_skipping_all_rows_raises(tmp_path):
    path = write(tmp_path, "x.jsonl", "a\nb\n")
    with pytest.raises(InputError) as error:
        load_table(path, "skip")
    assert str(error.value) == (
        f"{path}:1: not valid JSON (Expecting value, column 1). No row is left: --on-bad-row skip "
        f"would drop all 2 rows of {path}. Fix the file."
    )


@pytest.mark.parametrize(
    ("name", "content", "rows", "lines"),
    [
        ("x.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), [{"text": "a", "n": 1}], [1]),
        ("x.csv", b"\xef\xbb\xbftext\na\n", [{"text": "a"}], [2]),
        ("x.JSONL", "\n" + GOOD.strip(), [{"text": "a", "n": 1}], [2]),
        ("x.ndjson", '{"text": "a\u2028b"}\r\n', [{"text": "a\u2028b"}], [1]),
        ("x.jsonl", '{"n": 1}\n{"n": 1.5}\n', [{"n": 1}, {"n": 1.5}], [1, 2]),
        ("x.jsonl", '{"t": null}\n{"t": "a"}\n', [{"t": None}, {"t": "a"}], [1, 2]),
        ("x.json", '{"a": 1}\n{"a": null}', [{"a": 1}, {"a": None}], [1, 2]),
        ("x.json", '\n[\n {"t":\n  1},\n\n {"t": 2}]\n', [{"t": 1}, {"t": 2}], [3, 6]),
        ("x.json", '{"t": 1}\n{"t": 2}\n', [{"t": 1}, {"t": 2}], [1, 2]),
        ("x.json", '{"messages": [{"role": "user"}]}', [{"messages": [{"role": "user"}]}], [1]),
        ("x.csv", 'a,b\n"x\ny","""z"\n', [{"a": "x\ny", "b": '"z'}], [2]),
        ("x.csv", 'a,b\n"x\ny",\n\n1,2\n', [{"a": "x\ny", "b": ""}, {"a": "1", "b": "2"}], [2, 5]),
        ("x.tsv", "a\tb\nx, y\tz\n", [{"a": "x, y", "b": "z"}], [2]),
        ("x.txt", "\none\r\n two\n\n \nthree", [{"text": "one\n two"}, {"text": "three"}], [2, 6]),
        ("x.csv", "a\n" + "x" * 200_000 + "\n", [{"a": "x" * 200_000}], [2]),
    ],
)  # fmt: skip
def test_valid_files(tmp_path, name, content, rows, lines):
    table = load_table(write(tmp_path, name, content))
    assert table.rows == rows
    assert table.lines == lines
    assert table.where(0) == f"{tmp_path / name}:{lines[0]}"


def test_parquet_has_row_numbers_and_class_names(tmp_path):
    feature = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    several = {"feature": feature, "_type": "List"}
    features = {"label": feature, "text": {"_type": "Value"}, "tags": several}
    info = {"info": {"features": features}}
    data = pa.table({"text": ["a", "b"], "label": [0, 1]})
    path = tmp_path / "x.parquet"
    pq.write_table(data.replace_schema_metadata({"huggingface": json.dumps(info)}), path)
    table = load_table(path)
    assert table.rows == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert table.where(1) == f"{path} row 2"
    assert table.label_names == dict.fromkeys(("label", "tags"), ("neg", "pos"))


JSON_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e300, 1e300) | JSON_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_TEXT, inner, max_size=3),
    max_leaves=20,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.dictionaries(JSON_TEXT, JSON, min_size=1), ascii_=st.booleans())
def test_random_json_roundtrip(tmp_path, row, ascii_):
    rows = [row] * 3
    lines = "".join(json.dumps(row, ensure_ascii=ascii_) + "\n" for row in rows)
    assert load_table(write(tmp_path, "x.jsonl", lines)).rows == rows
    for indent in (None, 2):
        array = json.dumps(rows, ensure_ascii=ascii_, indent=indent)
        assert load_table(write(tmp_path, "x.json", array)).rows == rows


@pytest.mark.parametrize(
    "text",
    [r"\ud83d\ude42", r"\uD83D\uDE42\ud83d\ude42", r"\\ud83d", r"\\\ud83d\ude42"],
)
def test_surrogate_pairs_and_escaped_backslashes_are_valid(tmp_path, text):
    load_table(write(tmp_path, "x.jsonl", f'{{"text": "{text}"}}\n'))


@pytest.mark.parametrize(
    "text",
    [r"\ude42", r"\ud83d\ud83d\ude42", r"\ud83d\ude42\ude42", r"\\ud83d\ude42", r"\ud83d\\ude42"],
)
def test_lone_surrogates_are_bad_rows(tmp_path, text):
    with pytest.raises(InputError, match="half of a surrogate pair"):
        load_table(write(tmp_path, "x.jsonl", f'{{"text": "{text}"}}\n'))
