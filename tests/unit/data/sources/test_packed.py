"""Compressed files and pipes are read like plain files, and errors use their own names."""

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
import pytest

from ftlevel.data.prepare.dataset import resolve_files
from ftlevel.data.prepare.inference import file_rows
from ftlevel.data.sources.readers import ReadOptions, load_table, open_reader
from ftlevel.data.sources.readers.text import detect_file_format
from ftlevel.data.sources.splits import load_splits
from ftlevel.errors import InputError
from row_files import write_rows

ROWS = [{"id": str(i), "text": f"ä, {i}"} for i in range(150)]


def create_content(suffix: str) -> bytes:
    if suffix == "arrow":  # here as a stream
        table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=40)
        return sink.getvalue()
    return write_rows(Path(f"content.{suffix}"), ROWS).read_bytes()


@pytest.fixture(autouse=True)
def _empty_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
FORMATS = ("csv", "tsv", "jsonl", "json", "parquet", "arrow", "feather")


def read_rows(name: str, input_format: str | None = None) -> list[dict]:
    reader = open_reader(name, ReadOptions(input_format, columns={"text"}))
    return [row for row, *_ in file_rows(reader).read()]


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let stdin be a pipe with `content`."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))


@pytest.mark.parametrize("suffix", FORMATS)
def test_compressed_plain_and_piped_files_have_equal_rows(suffix, tmp_path, monkeypatch):
    content = create_content(suffix)
    uncompressed = tmp_path / f"x.{suffix}"
    uncompressed.write_bytes(content)
    assert read_rows(str(uncompressed)) == ROWS
    for end, compress in COMPRESSORS.items():
        compressed = tmp_path / f"y.{suffix}{end}"
        half = len(content) // 2
        compressed.write_bytes(compress(content[:half]) + compress(content[half:]))  # two members
        assert read_rows(str(compressed)) == ROWS
        table = load_table(compressed)
        assert list(table.rows) == ROWS
        assert table.where(149).startswith(str(compressed))
    for stdin_content in (content, *(compress(content) for compress in COMPRESSORS.values())):
        pipe(monkeypatch, stdin_content)
        assert read_rows("-") == ROWS


def test_errors_use_name_given_by_user(tmp_path, monkeypatch):
    compressed = tmp_path / "rows.csv.gz"
    compressed.write_bytes(gzip.compress(b'text\n"open'))
    with pytest.raises(InputError) as error:
        read_rows(str(compressed))
    assert str(error.value).startswith(f"{compressed}:2: a quote")
    compressed.write_bytes(gzip.compress(create_content("csv"))[:-20])
    with pytest.raises(InputError, match="cannot be unpacked"):
        read_rows(str(compressed))
    with pytest.raises(InputError, match="no such file"):
        read_rows(str(tmp_path / "none.csv.gz"))
    pipe(monkeypatch, b"Dear all, hello\n")
    with pytest.raises(InputError, match=r"does not identify its format\. Add --input-format, one"):
        read_rows("-")
    pipe(monkeypatch, b"Dear all, hello\n")
    assert read_rows("-", "txt") == [{"text": "Dear all, hello"}]
    pipe(monkeypatch, b"")
    with pytest.raises(InputError, match="stdin: has 0 rows"):
        read_rows("-")


@pytest.mark.parametrize("end", COMPRESSORS)
def test_damaged_compressed_file_raises_one_line(end, tmp_path):
    compressed = tmp_path / f"rows.jsonl{end}"
    content_compressed = COMPRESSORS[end](create_content("jsonl") * 50)
    for content, message in (
        (content_compressed[:-9], "cannot be unpacked"),
        (content_compressed[: len(content_compressed) // 2], "cannot be unpacked"),
        (create_content("jsonl"), f"is named {end} and does not begin like one"),
        (COMPRESSORS[end](b""), r"has 0 rows \(0 bytes\)"),
    ):
        compressed.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            load_table(compressed)
        assert len(error.value.problems) == 1
        assert str(error.value).startswith(f"{compressed}: ")


def test_changed_file_or_deleted_copy_is_decompressed_again(tmp_path):
    compressed = tmp_path / "rows.jsonl.gz"
    for text in ("a", "other"):
        compressed.write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
        assert read_rows(str(compressed)) == [{"text": text}]
    shutil.rmtree(open_reader(compressed).path.parents[1])
    assert read_rows(str(compressed)) == [{"text": "other"}]


def test_full_disk_raises(tmp_path, monkeypatch):
    compressed = tmp_path / "rows.jsonl.gz"
    compressed.write_bytes(gzip.compress(create_content("jsonl")))

    def raise_no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", raise_no_space)
    with pytest.raises(InputError, match=r"not enough space to unpack it in .*set TMPDIR"):
        load_table(compressed)


def test_stdin_is_cached_and_terminal_raises(monkeypatch):
    pipe(monkeypatch, create_content("jsonl"))
    assert list(load_table("-").rows) == list(load_table("-").rows) == ROWS
    assert load_table("-").where(2) == "stdin:3"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(InputError, match="stdin is a terminal"):
        load_table("-")


CONTENT_FORMATS = {
    b'{\n "data": [\n  {"text": "a"}]}\n': ".json",
    b"EU B-ORG\nrejects O\n\nPeter B-PER\n": ".conll",
    b"id\tnote\n1\tfine\n": ".tsv",
    b"first name,last name\nAda,Lovelace\n": ".csv",
    b"Dear all,\n\nhello, how are you, Bob?\n": None,
}


@pytest.mark.parametrize("content", CONTENT_FORMATS)
def test_format_is_detected_by_content(content, tmp_path):
    path = tmp_path / "stdin"
    path.write_bytes(content)
    detected = detect_file_format(path, ())
    assert (detected and detected[0]) == CONTENT_FORMATS[content]


REJECTED = {
    "photo.png": "is an image, and ftlevel trains on text",
    "call.mp3": "is audio, and ftlevel trains on text",
    "paper.pdf": r"is a document, .* Extract its text first",
    "all.zip": r"is an archive of files.* unzip all.zip",
    "my all.tar.gz": r"is an archive of files.* tar xf 'my all.tar.gz'",
    "old.xls": r"cannot read '.xls'.* Save the sheet as .xlsx or .csv",
    "notes": r"cannot read 'a file without extension'.*--input-format",
}


@pytest.mark.parametrize("name", REJECTED)
def test_media_and_document_files_raise(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"x") if name.endswith(".gz") else b"x")
    with pytest.raises(InputError, match=REJECTED[name]) as error:
        open_reader(path)
    assert str(error.value).startswith(str(path))


def test_broken_links_and_devices_raise(tmp_path):
    loop, other, dangling = (tmp_path / n for n in ("a.csv", "b.csv", "c.csv"))
    loop.symlink_to(other)
    other.symlink_to(loop)
    dangling.symlink_to("nowhere.csv")
    for path, message in (
        (loop, "is a symbolic link that leads back to itself"),
        (dangling, r"is a symbolic link to nowhere\.csv, which is not there"),
        (Path("/dev/null"), "is a device or a socket"),
    ):
        with pytest.raises(InputError, match=message):
            load_splits(str(path))


def _write_later(path: Path, content: bytes, wait: float = 0.0) -> threading.Thread:
    def write() -> None:
        with path.open("wb") as file:
            time.sleep(wait)
            file.write(content)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("name", ["rows", "rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("end", ["", *COMPRESSORS])
def test_named_pipe_is_cached(name, end, tmp_path):
    pipe = tmp_path / name
    os.mkfifo(pipe)
    content = create_content("jsonl")
    thread = _write_later(pipe, COMPRESSORS[end](content) if end else content, wait=0.1)
    assert read_rows(str(pipe)) == ROWS
    thread.join()
    table = load_table(pipe)
    assert list(table.rows) == ROWS
    assert table.where(2) == f"{pipe}:3"


def test_pipe_without_writer_or_rows_raises(tmp_path, monkeypatch):
    monkeypatch.setattr("ftlevel.data.sources.lines.WRITER_SECONDS", 0.2)
    pipe = tmp_path / "rows"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match=r"no program has written in 0\.2 seconds\. Start the"):
        load_splits(str(pipe))
    thread = _write_later(pipe, b"Dear all, hello\n")
    with pytest.raises(InputError, match=r"rows: its first line, 'Dear all, hello', does not id"):
        load_splits(str(pipe))
    thread.join()
    with pytest.raises(InputError, match=r"/dev/fd/987: was a shell pipe.*Pass it again"):
        load_splits("/dev/fd/987")


@pytest.mark.parametrize("pattern", ["parts/*.jsonl*", "parts/**/*", "par*/[ab].*", "parts/?.csv"])
def test_glob_pattern_reads_all_matching_files(pattern, tmp_path):
    Path("parts/deep").mkdir(parents=True)
    json_lines = [json.dumps(row) + "\n" for row in ROWS]
    if pattern.endswith("csv"):
        Path("parts/a.csv").write_bytes(create_content("csv"))
    else:
        Path("parts/a.jsonl").write_text("".join(json_lines[:100]))
        Path("parts/b.jsonl.gz").write_bytes(gzip.compress("".join(json_lines[100:]).encode()))
        Path("parts/README.md").write_text("no rows")
    for name in (pattern, str(tmp_path / pattern)):
        splits = load_splits(name)
        assert sorted(map(str, splits.train.rows)) == sorted(map(str, ROWS))
        assert splits.train.where(0).startswith(name.partition("par")[0] + "parts/a.")
        assert "files: " in splits.notes[0]


def test_invalid_glob_pattern_raises():
    Path("parts").mkdir()
    with pytest.raises(InputError, match=r"parts/\*\.jsonl: this pattern matches no file\."):
        load_splits("parts/*.jsonl")
    Path("parts/README.md").write_text("no rows")
    with pytest.raises(InputError, match=r"none of parts/README\.md can be read"):
        load_splits("parts/*")
    for name in ("train", "more", "validation"):
        Path(f"parts/{name}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r"matches parts/validation\.jsonl, named like evaluation"):
        load_splits("parts/*.jsonl")
    assert len(load_splits("parts/v*.jsonl").train) == 1
    with pytest.raises(InputError, match=r"parts/v\*\.jsonl is a pattern of files, without splits"):
        load_splits("parts/v*.jsonl", split="test")
    Path("parts/[x]*.jsonl").write_text('{"text": "b"}\n')
    assert load_splits("parts/[x]*.jsonl").train.rows == [{"text": "b"}]


def test_files_that_determine_cached_rows():
    for name in ("set/train.csv", "set/README.md", "set/runs/a.csv", "logs/a.log", "logs/b.log"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text\na\n")
    assert resolve_files("set") == [Path("set/train.csv")]
    assert resolve_files("logs/*.log", "csv") == [Path("logs/a.log"), Path("logs/b.log")]
