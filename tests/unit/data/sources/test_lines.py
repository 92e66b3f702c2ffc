"""Large files, read by line, give the same rows and errors as small files."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlevel.config import DataConfig
from ftlevel.data.formats.examples import LazyExamples, convert_rows
from ftlevel.data.sources import lines
from ftlevel.data.sources.lines import LineNumbers, LineRows
from ftlevel.data.sources.readers import load_table
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS

ROW = b'{"prompt": "caf\xc3\xa9 %d", "completion": "x"}\n'
GOOD_CONTENTS = [
    b"".join(ROW % i for i in range(5)),
    b"\xef\xbb\xbf" + b"".join(ROW % i for i in range(3)),
    (ROW % 1) + b"\n  \n" + (ROW % 2).rstrip(),
    ROW % 1 + b'{"prompt": " ", "completion": "x"}\n' + ROW % 2,  # an unusable row
    (ROW % 1).replace(b"\n", b"\r\n") + (ROW % 2),
    b"\n \n" + b"".join((ROW % i) + b"\n" * (i % 3) for i in range(300)),
    '{"prompt": "a\u2028b", "completion": "c\u0085d"}\n'.encode() + ROW % 2,
]
BAD_CONTENTS = [
    (ROW % 1) + b'{"prompt": "a", "comp',
    (ROW % 1) + b'["a"]\n',
    (ROW % 1) + b'{"prompt": "a", "prompt": "b", "completion": "c"}\n',
    (ROW % 1) * 3 + b'{"prompt": "a", "completion": 3}\n',
    (ROW % 1) * 3 + b'{"prompt": "a", "txt": "b"}\n',
    (ROW % 1) + '{"prompt": "\u00e9"}'.encode("latin-1"),
]


@pytest.mark.parametrize("content", GOOD_CONTENTS)
def test_large_file_has_same_rows_as_small_file(content, tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    small = load_table(path)
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    large = load_table(path)
    assert isinstance(large.rows, LineRows)
    assert list(large.rows) == small.rows
    assert list(large.lines) == small.lines
    selected = large.take([1, 0])
    assert [selected.rows[0], selected.rows[1]] == [small.rows[1], small.rows[0]]
    assert selected.where(0) == small.where(1)
    format_ = TASKS["text-generation"].get_format(small.column_names, DataConfig())
    examples, bad = convert_rows(large, format_)
    assert isinstance(examples, LazyExamples)
    assert (list(examples), bad) == convert_rows(small, format_)


@pytest.mark.parametrize("content", BAD_CONTENTS)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_large_file_has_same_errors_as_small_file(content, on_bad_row, tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    outcomes = []
    for size in (10**9, 0):
        monkeypatch.setattr(lines, "LARGE_BYTES", size)
        try:
            table = load_table(path, on_bad_row)  # type: ignore[arg-type]
            outcomes.append((list(table.rows), list(table.lines), table.dropped))
        except InputError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_random_access_to_rows(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join((ROW % i) + b"\n" * (i % 3) for i in range(700)))
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    table = load_table(path)
    for index in random.Random(0).choices(range(-700, 700), k=2_000):
        assert table.rows[index]["prompt"] == f"café {index % 700}"
    selected = table.take(range(650, 3, -7)).rows
    assert [row["prompt"] for row in selected] == [f"café {i}" for i in range(650, 3, -7)]
    assert [row["prompt"] for row in selected[2:5]] == ["café 636", "café 629", "café 622"]


@given(st.sets(st.integers(1, 60), min_size=1))
def test_line_numbers_roundtrip(added):
    numbers = LineNumbers()
    for line in sorted(added):
        numbers.append(line)
    assert list(numbers) == [numbers[i] for i in range(len(numbers))] == sorted(added)
    assert numbers[-1] == max(added)
    assert numbers[1:3] == sorted(added)[1:3]
    with pytest.raises(IndexError):
        numbers[len(added)]


def test_file_truncated_while_reading_raises(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(ROW % i for i in range(5_000)))
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    table = load_table(path)
    path.write_bytes(path.read_bytes()[:100_000])
    prompts = [row["prompt"] for row in table.rows[:2_000]]
    assert prompts == [f"caf\u00e9 {i}" for i in range(2_000)]
    with pytest.raises(InputError, match=r"x\.jsonl:4001: changed while it was read. Run again"):
        table.rows[4_000]


def test_lines_longer_than_read_buffer(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    texts = ["a" * size for size in (3, 65_536, 200_000, 5, 65_525, 65_526, 400_000)]
    rows = [{"prompt": text, "completion": "x"} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    table = load_table(path)
    assert list(table.rows) == rows
    assert [table.rows[i] for i in (6, 0, 4, 2)] == [rows[i] for i in (6, 0, 4, 2)]
