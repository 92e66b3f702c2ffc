"""A file that is packed or comes through a pipe is read as the file that it is, by its own name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from ftlevel.data.prepare.dataset import resolve_files
from ftlevel.data.prepare.inference import file_rows
from ftlevel.data.sources.readers import ReadOptions, load_table, open_reader, open_stream
from ftlevel.data.sources.readers.text import detect_file_format
from ftlevel.data.sources.splits import load_splits, open_source
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


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
FORMATS = ("csv", "tsv", "jsonl", "json", "parquet", "arrow", "feather")


def rows_of(name: str, wish: str | None = None) -> list[dict]:
    return [
        row for row, *_ in file_rows(open_reader(name, ReadOptions(wish, columns=KNOWN))).read()
    ]


@pytest.mark.parametrize("suffix", FORMATS)
def test_packed_plain_and_piped_are_the_same_rows(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(suffix)
    plain = tmp_path / f"x.{suffix}"
    plain.write_bytes(content)
    assert rows_of(str(plain)) == ROWS
    for end, pack in PACKERS.items():
        packed = tmp_path / f"y.{suffix}{end}"
        packed.write_bytes(pack(content))
        assert rows_of(str(packed)) == ROWS
        table = load_table(packed)
        assert list(table.rows) == ROWS
        assert table.where(149).startswith(str(packed))
    for piped in (content, *(pack(content) for pack in PACKERS.values())):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(piped)))
        assert rows_of("-") == ROWS


@pytest.mark.parametrize("suffix", ["arrow", "feather"])
def test_arrow_is_a_table_and_goes_on_from_every_cursor(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content_of(suffix))
    table = load_table(path)
    assert list(table.rows) == ROWS
    assert table.where(149).endswith(" row 150")
    chunks = list(open_stream(path).chunks())
    for at, chunk in enumerate(chunks):
        later = list(open_stream(path).chunks(chunk.cursor))
        assert [c.rows for c in later] == [c.rows for c in chunks[at + 1 :]]
    path.write_bytes(b"ARROW1 and no more")
    with pytest.raises(InputError, match="not a readable Arrow file"):
        load_table(path)


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
    with pytest.raises(
        InputError, match=r"does not identify its format\. Add --input-format, one of"
    ):
        rows_of("-")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"Dear all, hello\n")))
    assert rows_of("-", "txt") == [{"text": "Dear all, hello"}]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    with pytest.raises(InputError, match="stdin: has 0 rows"):
        rows_of("-")


@pytest.mark.parametrize("end", PACKERS)
def test_what_is_cut_or_not_packed_is_one_line(end: str, tmp_path: Path) -> None:
    packed = tmp_path / f"rows.jsonl{end}"
    whole = PACKERS[end](content_of("jsonl") * 50)
    for content, words in (
        (whole[:-9], "cannot be unpacked"),
        (whole[: len(whole) // 2], "cannot be unpacked"),
        (content_of("jsonl"), f"is named {end} and does not begin like one"),
        (PACKERS[end](b""), r"has 0 rows \(0 bytes\)"),
    ):
        packed.write_bytes(content)
        with pytest.raises(InputError, match=words) as caught:
            load_table(packed)
        assert len(caught.value.problems) == 1
        assert str(caught.value).startswith(f"{packed}: ")


def test_members_behind_one_another_are_all_read(tmp_path: Path) -> None:
    for end, pack in PACKERS.items():
        packed = tmp_path / f"rows.jsonl{end}"
        packed.write_bytes(pack(content_of("jsonl")) + pack(content_of("jsonl")))
        assert list(load_table(packed).rows) == ROWS + ROWS


def test_a_packed_stream_goes_on_from_every_cursor(tmp_path: Path) -> None:
    packed = tmp_path / "rows.csv.zst"
    packed.write_bytes(PACKERS[".zst"](content_of("csv")))
    chunks = list(open_stream(packed).chunks())
    assert [len(chunk.rows) for chunk in chunks] == [64, 64, 22]
    assert chunks[0].source == str(packed)
    for at, chunk in enumerate(chunks):
        later = list(open_stream(packed).chunks(chunk.cursor))
        assert [c.rows for c in later] == [c.rows for c in chunks[at + 1 :]]


def test_a_file_that_changed_is_unpacked_again(tmp_path: Path) -> None:
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert rows_of(str(packed)) == [{"text": "a"}]
    packed.write_bytes(gzip.compress(b'{"text": "other"}\n'))
    assert rows_of(str(packed)) == [{"text": "other"}]


def test_a_copy_that_was_cleaned_away_is_made_again(tmp_path: Path) -> None:
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(content_of("jsonl")))
    shutil.rmtree(open_reader(packed).path.parents[1])
    assert rows_of(str(packed)) == ROWS


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(content_of("jsonl")))

    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", fill)
    with pytest.raises(InputError, match=r"not enough space to unpack it in .*set TMPDIR"):
        load_table(packed)


def test_stdin_is_read_once_and_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content_of("jsonl"))))
    assert list(load_table("-").rows) == list(load_table("-").rows) == ROWS
    assert load_table("-").where(2) == "stdin:3"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(InputError, match="stdin is a terminal"):
        load_table("-")


STDIN = {
    b'{\n "data": [\n  {"text": "a"}]}\n': ".json",
    b"EU B-ORG\nrejects O\n\nPeter B-PER\n": ".conll",
    b"id\tnote\n1\tfine\n": ".tsv",
    b"first name,last name\nAda,Lovelace\n": ".csv",
    b"Dear all,\n\nhello, how are you, Bob?\n": None,
}


@pytest.mark.parametrize("content", STDIN)
def test_a_format_is_told_by_its_beginning(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stdin"
    path.write_bytes(content)
    found = detect_file_format(path, ())
    assert (found and found[0]) == STDIN[content]


REFUSED = {
    "photo.png": "is an image, and ftlevel trains on text",
    "call.mp3": "is audio, and ftlevel trains on text",
    "paper.pdf": r"is a document, .* Extract its text first",
    "all.zip": r"is an archive of files.* unzip all.zip",
    "my all.tar.gz": r"is an archive of files.* tar xf 'my all.tar.gz'",
    "old.xls": r"cannot read '.xls'.* Save the sheet as .xlsx or .csv",
    "notes": r"cannot read 'a file without extension'.*--input-format",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_rows_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"x") if name.endswith(".gz") else b"x")
    with pytest.raises(InputError, match=REFUSED[name]) as caught:
        open_reader(path)
    assert str(caught.value).startswith(str(path))


def test_links_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    loop, other, gone = (tmp_path / n for n in ("a.csv", "b.csv", "c.csv"))
    loop.symlink_to(other)
    other.symlink_to(loop)
    gone.symlink_to("nowhere.csv")
    for path, words in (
        (loop, "is a symbolic link that leads back to itself"),
        (gone, r"is a symbolic link to nowhere\.csv, which is not there"),
        (Path("/dev/null"), "is a device or a socket"),
    ):
        with pytest.raises(InputError, match=words):
            load_splits(str(path))
        with pytest.raises(InputError, match=words):
            open_source(str(path))


def _write_later(path: Path, content: bytes, wait: float = 0.0) -> threading.Thread:
    def write() -> None:
        with path.open("wb") as file:
            time.sleep(wait)
            file.write(content)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("name", ["rows", "rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("end", ["", *PACKERS])
def test_a_pipe_with_a_name_is_read_once(name: str, end: str, tmp_path: Path) -> None:
    pipe = tmp_path / name
    os.mkfifo(pipe)
    content = content_of("jsonl")
    thread = _write_later(pipe, PACKERS[end](content) if end else content, wait=0.1)
    assert rows_of(str(pipe)) == ROWS
    thread.join()
    table = load_table(pipe)
    assert list(table.rows) == ROWS
    assert table.where(2) == f"{pipe}:3"
    chunks = list(open_stream(pipe).chunks())
    assert [c.rows for c in open_stream(pipe).chunks(chunks[0].cursor)] == [
        c.rows for c in chunks[1:]
    ]


def test_a_pipe_without_a_writer_or_without_rows_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftlevel.data.sources.lines.WRITER_SECONDS", 0.2)
    pipe = tmp_path / "rows"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match=r"no program has written in 0\.2 seconds\. Start the"):
        load_splits(str(pipe))
    thread = _write_later(pipe, b"Dear all, hello\n")
    with pytest.raises(
        InputError, match=r"rows: its first line, 'Dear all, hello', does not identify"
    ):
        load_splits(str(pipe))
    thread.join()
    with pytest.raises(InputError, match=r"/dev/fd/987: was a shell pipe.*Pass it again"):
        load_splits("/dev/fd/987")


@pytest.mark.parametrize("pattern", ["parts/*.jsonl*", "parts/**/*", "par*/[ab].*", "parts/?.csv"])
def test_a_pattern_reads_all_files_that_match(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("parts/deep").mkdir(parents=True)
    some = [json.dumps(row) + "\n" for row in ROWS]
    if pattern.endswith("csv"):
        Path("parts/a.csv").write_bytes(content_of("csv"))
    else:
        Path("parts/a.jsonl").write_text("".join(some[:100]))
        Path("parts/b.jsonl.gz").write_bytes(gzip.compress("".join(some[100:]).encode()))
        Path("parts/README.md").write_text("no rows")
    for name in (pattern, str(tmp_path / pattern)):
        splits = load_splits(name)
        assert sorted(map(str, splits.train.rows)) == sorted(map(str, ROWS))
        assert splits.train.where(0).startswith(name.partition("par")[0] + "parts/a.")
        assert "files: " in splits.notes[0]
        source = open_source(name)
        assert [row for chunk in source.train.chunks() for row in chunk.rows] == ROWS
        assert resolve_files(name) == list(source.files)


def test_a_pattern_that_cannot_be_used_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("parts").mkdir()
    with pytest.raises(InputError, match=r"parts/\*\.jsonl: this pattern matches no file\."):
        load_splits("parts/*.jsonl")
    Path("parts/README.md").write_text("no rows")
    with pytest.raises(InputError, match=r"none of parts/README\.md can be read"):
        load_splits("parts/*")
    for name in ("train", "more", "validation"):
        Path(f"parts/{name}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(
        InputError,
        match=(
            r"matches parts/validation\.jsonl, named like evaluation "
            r"data, and"
        ),
    ):
        load_splits("parts/*.jsonl")
    assert len(load_splits("parts/v*.jsonl").train) == 1
    with pytest.raises(InputError, match=r"parts/v\*\.jsonl is a pattern of files, without splits"):
        load_splits("parts/v*.jsonl", split="test")
    Path("parts/[x]*.jsonl").write_text('{"text": "b"}\n')
    assert load_splits("parts/[x]*.jsonl").train.rows == [{"text": "b"}]
