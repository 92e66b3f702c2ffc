"""Streaming of every container: the rows of the table reader, resumable from every cursor."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlevel.data.sources.hub import IterableStream
from ftlevel.data.sources.readers import ReadOptions, load_table, open_stream
from ftlevel.data.sources.readers.arrow import ParquetReader
from ftlevel.data.sources.readers.json import JsonLinesReader
from ftlevel.data.sources.splits import open_source
from ftlevel.data.sources.streams import Chunk, Stream
from ftlevel.errors import InputError

COUNT = 150
ROWS = [{"text": f'row {i}\nof two lines, "quoted" é', "n": str(i)} for i in range(COUNT)]


def write_jsonl(path: Path, rows: list[Any] = ROWS) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    return path


def write_csv(path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_txt(path: Path) -> Path:
    path.write_text("\n\n\n".join(row["text"] for row in ROWS), encoding="utf-8")
    return path


def write_parquet(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=70)
    return path


def write_arrow(path: Path) -> Path:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with path.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return path


def write_conll(path: Path) -> Path:
    words = [[(w, "O") for w in row["text"].split()] for row in ROWS]
    text = "\n".join("".join(f"{w} X {t}\n" for w, t in sentence) for sentence in words)
    path.write_text(f"-DOCSTART- -X- O\n\n{text}", encoding="utf-8")
    return path


def write_xlsx(path: Path) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [list(ROWS[0]), *(list(row.values()) for row in ROWS)]:
        book.active.append(row)
    book.save(path)
    return path


FILES: dict[str, Callable[[Path], Path]] = {
    "x.jsonl": write_jsonl, "x.csv": write_csv, "x.tsv": write_csv, "x.txt": write_txt,
    "x.parquet": write_parquet, "x.arrow": write_arrow, "x.conll": write_conll,
    "x.xlsx": write_xlsx,
}  # fmt: skip


def flatten(chunks: list[Chunk]) -> list[tuple[int, Any]]:
    return [pair for c in chunks for pair in zip(c.lines, c.rows, strict=True)]


def assert_resumes_from_every_cursor(stream: Stream) -> None:
    chunks = list(stream.chunks())
    assert len(chunks) > 1
    for number, chunk in enumerate(chunks, 1):
        cursor = json.loads(json.dumps(chunk.cursor))
        assert flatten(list(stream.chunks(cursor))) == flatten(chunks[number:])


@pytest.mark.parametrize("name", FILES)
def test_streamed_rows_equal_table_rows(name: str, tmp_path: Path) -> None:
    path = FILES[name](tmp_path / name)
    stream, table = open_stream(path), load_table(path)
    rows = flatten(list(stream.chunks()))
    assert [row for _, row in rows] == list(table.rows)
    assert [line for line, _ in rows] == list(table.lines)
    assert_resumes_from_every_cursor(stream)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt", "x.conll"])
def test_bytes_before_cursor_are_not_read(name: str, tmp_path: Path) -> None:
    path = FILES[name](tmp_path / name)
    stream = open_stream(path)
    first, *others = stream.chunks()
    offset = first.cursor["at"]
    with path.open("r+b") as file:
        file.write(b"\xff" * offset)
    assert flatten(list(stream.chunks(first.cursor))) == flatten(others)
    with pytest.raises(InputError, match="not UTF-8"):
        list(JsonLinesReader(path).chunks())


def test_parquet_resume_skips_earlier_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(write_parquet(tmp_path / "x.parquet"))
    assert isinstance(stream, ParquetReader)
    cursor = [chunk.cursor for chunk in stream.chunks()][-2]
    row_groups_read: list[Any] = []
    parquet_file = stream._file

    class Spy:
        num_row_groups = parquet_file.num_row_groups

        def iter_batches(self, size: int, row_groups: list[int], **options: Any) -> Any:
            row_groups_read.extend(row_groups)
            return parquet_file.iter_batches(size, row_groups=row_groups, **options)

    monkeypatch.setattr(stream, "_file", Spy())
    list(stream.chunks(cursor))
    assert row_groups_read == [
        cursor["group"],
        *range(cursor["group"] + 1, parquet_file.num_row_groups),
    ]
    assert row_groups_read[0] > 0


def test_files_are_streamed_in_order(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(100)])
    source = open_source(str(tmp_path))
    assert [row["text"] for _, row in flatten(list(source.train.chunks()))] == [
        f"{name} {i}" for name in "abc" for i in range(100)
    ]
    assert [chunk.source for chunk in source.train.chunks()][-1] == str(tmp_path / "c.jsonl")
    assert_resumes_from_every_cursor(source.train)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_iterable_dataset_resumes_from_cursor(kind: str, tmp_path: Path) -> None:
    """Uses local files in place of the Hub."""
    import datasets

    names = []
    for number, part in enumerate((ROWS[:80], ROWS[80:])):
        path = tmp_path / f"{number}.{kind}"
        if kind == "json":
            path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        else:
            datasets.Dataset.from_list(part).to_parquet(path)
        names.append(str(path))
    load_dataset = lambda: datasets.load_dataset(  # noqa: E731
        kind, data_files={"train": names}, streaming=True
    )["train"]
    stream = IterableStream(load_dataset, "hub (train)")
    rows = flatten(list(stream.chunks()))
    assert rows == list(enumerate(ROWS, 1))
    assert_resumes_from_every_cursor(stream)


def test_saved_dataset_is_streamed(tmp_path: Path) -> None:
    import datasets

    splits = {"train": datasets.Dataset.from_list(ROWS), "validation": ROWS[:5]}
    splits["validation"] = datasets.Dataset.from_list(ROWS[:5])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"), options=ReadOptions(limit=3))
    assert source.validation is not None
    assert list(source.validation.rows) == ROWS[:3]
    assert flatten(list(source.train.chunks())) == list(enumerate(ROWS, 1))
    assert_resumes_from_every_cursor(source.train)


def test_line_numbers_of_errors_after_cursor(tmp_path: Path) -> None:
    lines = [json.dumps({"text": str(i)}) for i in range(200)]
    lines[149] = '{"text" 5}'
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    stream = open_stream(path)
    cursor = next(stream.chunks()).cursor
    bad = [row for chunk in stream.chunks(cursor) for row in chunk.errors]
    assert [(row.line, row.message) for row in bad] == [
        (150, "not valid JSON (Expecting ':' delimiter, column 9)")
    ]
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"180"', b'"18\xe9"'))
    with pytest.raises(InputError) as error:
        list(open_stream(path).chunks(cursor))
    offset = path.read_bytes().index(b"\xe9")
    assert str(error.value) == (
        f"{path}:181: not UTF-8 (byte 0xe9 at offset {offset:,}). If it is Latin-1: "
        "iconv -f LATIN1 -t UTF-8 x.jsonl > utf8-x.jsonl"
    )


def test_unclosed_quote_raises(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,n\n" + "a,1\n" * 100 + '"b,1\nc,1\n', encoding="utf-8")
    with pytest.raises(InputError) as error:
        list(open_stream(path).chunks())
    assert str(error.value) == (
        f'{path}:102: a quote (") is opened in this row and never closed. Close it.'
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


def read_stream(path: Path) -> Any:
    try:
        rows = flatten(list(open_stream(path).chunks()))
    except InputError as error:
        return error.problems
    return rows or [f"{path}: has 0 rows. Use a file with rows."]


@pytest.mark.parametrize("name", CASES)
def test_stream_accepts_and_rejects_like_table(name: str, tmp_path: Path) -> None:
    file, content, expected = CASES[name]
    path = tmp_path / file
    path.write_bytes(content)
    for rows in (read_table(path), read_stream(path)):
        assert rows[-1] == (f"{path}{expected}" if isinstance(expected, str) else expected)


def test_stream_and_table_reject_the_same_parquet_files(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert read_stream(path) == [f"{path}: has the column 'text' twice. Rename one."]
    pq.write_table(pa.table({}), path)
    assert read_stream(path) == read_table(path) == [f"{path}: has 0 rows. Use a file with rows."]
    content = write_parquet(path).read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 200 + content[204:])  # data pages, not the footer
    [message] = read_stream(path)
    assert message.startswith(f"{path}: ")
    assert read_table(path) == [message]


def test_csv_with_carriage_returns_resumes_from_every_cursor(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"text,n\r" + b'"a\rb",1\r' * 150)
    assert_resumes_from_every_cursor(open_stream(path))


def test_deleted_file_raises(tmp_path: Path) -> None:
    path = write_txt(tmp_path / "x.txt")
    stream = open_stream(path)
    path.unlink()
    with pytest.raises(InputError) as error:
        next(stream.chunks())
    assert str(error.value) == f"{path}: cannot be read (No such file or directory)."


def test_rows_dropped_from_the_validation_split_are_noted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl")
    path = write_jsonl(tmp_path / "validation.jsonl")
    with path.open("a") as file:
        file.write("\noops\n")
    source = open_source(str(tmp_path), on_bad_row="skip")
    assert source.validation is not None
    assert len(source.validation) == len(ROWS)
    assert source.notes[0].startswith(f"{path}: dropped 1 of {len(ROWS) + 1:,} rows (line ")
