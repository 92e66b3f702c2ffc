"""Chunks of every file format have the rows of its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftlevel.data.sources.readers import load_table, open_reader
from ftlevel.data.sources.streams import Chunk
from ftlevel.errors import InputError
from row_files import write_rows

COUNT = 150
ROWS = [{"text": f'row {i}\nof two lines, "quoted" é', "n": str(i)} for i in range(COUNT)]


def write_jsonl(path: Path) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    return path


def write_txt(path: Path) -> Path:
    path.write_text("\n\n\n".join(row["text"] for row in ROWS), encoding="utf-8")
    return path


def write_conll(path: Path) -> Path:
    words = [[(w, "O") for w in row["text"].split()] for row in ROWS]
    text = "\n".join("".join(f"{w} X {t}\n" for w, t in sentence) for sentence in words)
    path.write_text(f"-DOCSTART- -X- O\n\n{text}", encoding="utf-8")
    return path


SPECIAL = {".jsonl": write_jsonl, ".txt": write_txt, ".conll": write_conll}
FORMATS = (*SPECIAL, ".csv", ".tsv", ".parquet", ".arrow", ".xlsx")


def flatten(chunks: list[Chunk]) -> list[tuple[int, Any]]:
    return [pair for c in chunks for pair in zip(c.lines, c.rows, strict=True)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_of_chunks_equal_table_rows(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    SPECIAL.get(suffix, lambda path: write_rows(path, ROWS))(path)
    reader, table = open_reader(path), load_table(path)
    chunks = list(reader.chunks())
    rows = flatten(chunks)
    assert [row for _, row in rows] == list(table.rows)
    assert [line for line, _ in rows] == list(table.lines)
    shares = [reader.share(chunk) for chunk in chunks]
    is_known = suffix not in (".arrow", ".xlsx")
    assert shares[-1] == (1.0 if is_known else None)
    assert not is_known or sorted(set(shares)) == shares


def test_line_numbers_of_errors_after_the_first_chunk(tmp_path):
    lines = [json.dumps({"text": str(i)}) for i in range(200)]
    lines[149] = '{"text" 5}'
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    bad = [row for chunk in open_reader(path).chunks() for row in chunk.errors]
    assert [(row.line, row.message) for row in bad] == [
        (150, "not valid JSON (Expecting ':' delimiter, column 9)")
    ]
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"180"', b'"18\xe9"'))
    with pytest.raises(InputError) as error:
        list(open_reader(path).chunks())
    offset = path.read_bytes().index(b"\xe9")
    assert str(error.value) == (
        f"{path}:181: not UTF-8 (byte 0xe9 at offset {offset:,}). If it is Latin-1: "
        "iconv -f LATIN1 -t UTF-8 x.jsonl > utf8-x.jsonl"
    )


GZIP = b"\x1f\x8b\x08abc"
MAC = b"text,n\ra,1\r" + b"b,2\r\n" * 70 + b'"c\rd",3\re,4'
EMPTY = "has 0 rows. Use a file with rows."
# (file name, content, the last row with its line, or the message after the path)
CASES: dict[str, tuple[str, bytes, tuple[int, dict[str, str]] | str]] = {
    "a carriage return ends a line of CSV": ("x.csv", MAC, (75, {"text": "e", "n": "4"})),
    "blank lines before the header": (
        "x.tsv", b"\n\r\n" + b"text\tn\n" + b"a\t1\n" * 70, (73, {"text": "a", "n": "1"})),
    "a long name of a column": (
        "x.csv", b"x" * 200_000 + b",n\na,1\n", (2, {"x" * 200_000: "a", "n": "1"})),
    "a byte order mark and no more": ("x.jsonl", b"\xef\xbb\xbf", f": {EMPTY}"),
    "a header without rows": ("x.csv", b"text,n\n", f": {EMPTY}"),
    "a header twice": (
        "x.csv", b"text,text\na,b\n",
        ":1: the header has 'text' twice. Rename one of them."),
    "no bytes": ("x.parquet", b"", ": has 0 rows (0 bytes). Use a file with rows."),
    "a quote never closed": (
        "x.csv", b"text,n\n" + b"a,1\n" * 100 + b'"b,1\nc,1\n',
        ':102: a quote (") is opened in this row and never closed. Close it.'),
    "no Parquet": (
        "x.parquet", b"PAR1 and no more",
        ": not a readable Parquet file (Parquet magic bytes not found in footer. Either the file "
        "is corrupted or this is not a parquet file). Was the download or copy cut short? Fetch "
        "it again."),
    "a packed file": (
        "x.jsonl.gz", GZIP,
        ": cannot be unpacked (Compressed file ended before the end-of-stream marker was reached). "
        "Was the download or copy cut short?"),
    "a packed file by another name": (
        "x.txt", GZIP, ": is compressed by gzip. Name it x.txt.gz."),
    "an array of JSON": (
        "x.jsonl", b'[{"text": "a"}]',
        ":1: looks like one JSON array, where one object a line is expected. Rename it to x.json"),
    "Latin-1 behind a broken line": (
        "x.jsonl", b'{"text"\n' * 70 + b'{"text": "\xe9"}\n',
        ":71: not UTF-8 (byte 0xe9 at offset 570). If it is Latin-1: "
        "iconv -f LATIN1 -t UTF-8 x.jsonl > utf8-x.jsonl"),
    "Latin-1 behind a faulty header": (
        "x.csv", b"text;n\n\xe9;1\n",
        ":2: not UTF-8 (byte 0xe9 at offset 7). If it is Latin-1: "
        "iconv -f LATIN1 -t UTF-8 x.csv > utf8-x.csv"),
    "a quote within a cell": (
        "x.csv", b"text,n\n" + b"a,1\n" * 70 + b'"a" b,1\n',
        ":72: not valid CSV (',' expected after '\"'). Put quotes around the whole cell and double "
        '(") those inside it.'),
}  # fmt: skip


def read_table(path: Path) -> Any:
    try:
        table = load_table(path, "skip")
    except InputError as error:
        return error.problems
    return list(zip(table.lines, table.rows, strict=True))


def read_chunks(path: Path) -> Any:
    try:
        rows = flatten(list(open_reader(path).chunks()))
    except InputError as error:
        return error.problems
    return rows or [f"{path}: has 0 rows. Use a file with rows."]


@pytest.mark.parametrize("name", CASES)
def test_chunks_are_accepted_and_rejected_like_tables(name, tmp_path):
    file, content, expected = CASES[name]
    path = tmp_path / file
    path.write_bytes(content)
    for rows in (read_table(path), read_chunks(path)):
        assert rows[-1] == (f"{path}{expected}" if isinstance(expected, str) else expected)


def test_chunks_and_tables_reject_the_same_parquet_files(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    message = f"{path}: has the column 'text' twice. Rename one."
    assert read_chunks(path) == read_table(path) == [message]
    pq.write_table(pa.table({}), path)
    assert read_chunks(path) == read_table(path) == [f"{path}: has 0 rows. Use a file with rows."]
    content = write_rows(path, ROWS).read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 200 + content[204:])  # data pages, not the footer
    [message] = read_chunks(path)
    assert message.startswith(f"{path}: ")
    assert read_table(path) == [message]


def test_deleted_file_raises(tmp_path):
    path = write_txt(tmp_path / "x.txt")
    reader = open_reader(path)
    path.unlink()
    with pytest.raises(InputError) as error:
        next(reader.chunks())
    assert str(error.value) == f"{path}: cannot be read (No such file or directory)."
