"""A file that is packed or comes through a pipe is read as the file that it is, by its own name."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from ftlevel.data.prepare.questions import FileRows
from ftlevel.data.sources.one_file import opened_file
from ftlevel.data.sources.readers.files import read_table
from ftlevel.errors import InputError

ROWS = [{"id": str(i), "text": f"ä, {i}"} for i in range(150)]
KNOWN = {"text"}


def content_of(suffix: str) -> bytes:
    table = pa.Table.from_pylist(ROWS)
    sink = io.BytesIO()
    if suffix == "csv":
        return b"id,text\n" + "".join(f'{r["id"]},"{r["text"]}"\n' for r in ROWS).encode()
    if suffix == "tsv":
        return b"id\ttext\n" + "".join(f"{r['id']}\t{r['text']}\n" for r in ROWS).encode()
    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if suffix == "json":
        return json.dumps(ROWS).encode()
    if suffix == "parquet":
        pq.write_table(table, sink)
    elif suffix == "arrow":
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=40)
    else:
        pyarrow.feather.write_feather(table, sink, chunksize=40)
    return sink.getvalue()


FORMATS = ("csv", "tsv", "jsonl", "json", "parquet", "arrow", "feather")


def rows_of(name: str, wish: str | None = None) -> list[dict]:
    with opened_file(name, wish, KNOWN) as file:
        return [row for row, *_ in FileRows(file).read()]


@pytest.mark.parametrize("suffix", FORMATS)
def test_packed_plain_and_piped_are_the_same_rows(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(suffix)
    plain, packed = tmp_path / f"x.{suffix}", tmp_path / f"y.{suffix}.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    assert rows_of(str(plain)) == rows_of(str(packed)) == ROWS
    for piped in (content, gzip.compress(content)):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(piped)))
        assert rows_of("-") == ROWS


@pytest.mark.parametrize("suffix", ["arrow", "feather"])
def test_arrow_is_a_table_and_goes_on_from_every_cursor(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content_of(suffix))
    table = read_table(path)
    assert list(table.rows) == ROWS
    assert table.where(149).endswith(" row 150")
    from ftlevel.data.sources.readers.files import open_stream

    chunks = list(open_stream(path).chunks())
    for at, chunk in enumerate(chunks):
        later = list(open_stream(path).chunks(chunk.cursor))
        assert [c.rows for c in later] == [c.rows for c in chunks[at + 1 :]]
    path.write_bytes(b"ARROW1 and no more")
    with pytest.raises(InputError, match="not a readable Arrow file"):
        read_table(path)


def test_errors_name_what_the_user_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(b'text\n"open'))
    with pytest.raises(InputError) as caught:
        rows_of(str(packed))
    assert str(caught.value).startswith(f"{packed}:2: a quote")
    packed.write_bytes(gzip.compress(content_of("csv"))[:-20])
    with pytest.raises(InputError, match="cannot be unpacked"):
        rows_of(str(packed))
    with pytest.raises(InputError, match="no such file"):
        rows_of(str(tmp_path / "none.csv.gz"))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"Dear all, hello\n")))
    with pytest.raises(InputError, match=r"does not say what format it is. Pass --input-format"):
        rows_of("-")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"Dear all, hello\n")))
    assert rows_of("-", "txt") == [{"text": "Dear all, hello"}]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    with pytest.raises(InputError, match="stdin: has 0 rows"):
        rows_of("-")
