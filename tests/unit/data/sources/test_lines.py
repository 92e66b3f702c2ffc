"""A large file is read by line as a small one is: the same rows, the same complaints."""

from __future__ import annotations

import json
import random
from pathlib import Path

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
GOOD = [
    b"".join(ROW % i for i in range(5)),
    b"\xef\xbb\xbf" + b"".join(ROW % i for i in range(3)),
    (ROW % 1) + b"\n  \n" + (ROW % 2).rstrip(),
    (ROW % 1).replace(b"\n", b"\r\n") + (ROW % 2),
    b"\n \n" + b"".join((ROW % i) + b"\n" * (i % 3) for i in range(300)),
    '{"prompt": "a\u2028b", "completion": "c\u0085d"}\n'.encode() + ROW % 2,
]
BAD = [
    (ROW % 1) + b'{"prompt": "a", "comp',
    (ROW % 1) + b'["a"]\n',
    (ROW % 1) + b'{"prompt": "a", "prompt": "b", "completion": "c"}\n',
    (ROW % 1) * 3 + b'{"prompt": "a", "completion": 3}\n',
    (ROW % 1) * 3 + b'{"prompt": "a", "txt": "b"}\n',
    (ROW % 1) + '{"prompt": "\u00e9"}'.encode("latin-1"),
]


@pytest.mark.parametrize("content", GOOD)
def test_the_same_rows(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    small = load_table(path)
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    large = load_table(path)
    assert isinstance(large.rows, LineRows)
    assert list(large.rows) == small.rows
    assert list(large.lines) == small.lines
    taken = large.take([1, 0])
    assert [taken.rows[0], taken.rows[1]] == [small.rows[1], small.rows[0]]
    assert taken.where(0) == small.where(1)
    format_ = TASKS["text-generation"].get_format(small.column_names, DataConfig())
    examples, bad = convert_rows(large, format_)
    assert isinstance(examples, LazyExamples)
    assert (list(examples), bad) == convert_rows(small, format_)


@pytest.mark.parametrize("content", BAD)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_the_same_complaints(
    content: bytes, on_bad_row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_rows_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join((ROW % i) + b"\n" * (i % 3) for i in range(700)))
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    table = load_table(path)
    for index in random.Random(0).choices(range(-700, 700), k=2_000):
        assert table.rows[index]["prompt"] == f"caf\u00e9 {index % 700}"
    some = table.take(range(650, 3, -7))
    assert [row["prompt"] for row in some.rows] == [f"caf\u00e9 {i}" for i in range(650, 3, -7)]
    assert [row["prompt"] for row in some.rows[2:5]] == [
        "caf\u00e9 636",
        "caf\u00e9 629",
        "caf\u00e9 622",
    ]


@given(st.sets(st.integers(1, 60), min_size=1))
def test_line_numbers_are_those_that_were_added(found: set[int]) -> None:
    numbers = LineNumbers()
    for line in sorted(found):
        numbers.append(line)
    assert list(numbers) == [numbers[i] for i in range(len(numbers))] == sorted(found)
    assert numbers[-1] == max(found)
    assert numbers[1:3] == sorted(found)[1:3]
    with pytest.raises(IndexError):
        numbers[len(found)]


def test_a_file_that_is_cut_meanwhile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(ROW % i for i in range(5_000)))
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    table = load_table(path)
    path.write_bytes(path.read_bytes()[:100_000])
    read = [row["prompt"] for row in table.rows[:2_000]]
    assert read == [f"caf\u00e9 {i}" for i in range(2_000)]
    with pytest.raises(InputError, match=r"x\.jsonl:4001: changed while it was read. Run again"):
        table.rows[4_000]


def test_a_line_may_be_longer_than_what_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    texts = ["a" * size for size in (3, 65_536, 200_000, 5, 65_525, 65_526, 400_000)]
    rows = [{"prompt": text, "completion": "x"} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    table = load_table(path)
    assert list(table.rows) == rows
    assert [table.rows[i] for i in (6, 0, 4, 2)] == [rows[i] for i in (6, 0, 4, 2)]
