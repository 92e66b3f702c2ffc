"""Random files are read or raise an error that names the file; never a traceback."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftlevel.data.sources.readers import ReadOptions, load_table, open_reader
from ftlevel.errors import InputError

SQUAD = b"""{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers":
[{"text": "c", "answer_start": 0}]}]}]}]}"""
SEEDS: dict[str, tuple[bytes, ...]] = {
    ".jsonl": (b'{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n', b'["a", {"entities": []}]\n'),
    ".json": (
        b'[{"text": "a"}, {"text": "b"}]',
        b'{"data": [{"text": "a"}]}',
        b'{"text": ["a", "b"], "n": [1, 2]}',
        b'{"text": {"0": "a"}, "n": {"0": 1}}',
        b'{"columns": ["a"], "data": [["x"]]}',
        SQUAD,
    ),
    ".csv": (b'text,n\na,1\n"b ""q""",2\n', b"a;b\nc;d\n", b"1,2\n3,4\n"),
    ".tsv": (b"a\tb\nc\td\n", b"EU\tB-ORG\nis\tO\n"),
    ".conll": (b"-DOCSTART- X O\n\nEU NN B-ORG\n# c\nx NN O\n\n# NN O\n",),
    ".txt": (b"a O\nb B-X\n\nc O\n", b"hello\n\nworld\n"),
}
PIECES = (
    b"\n", b"\r", b"\t", b",", b";", b'"', b"{", b"}", b"[", b"]", b"\x00", b"\xff",
    b"\xef\xbb\xbf", b"#", b" ", b"null", b"1e999", b"\\ud800", b"\x1f\x8b", b"-DOCSTART-", b"NaN",
    b"\xe2\x80\xa8",
)  # fmt: skip
COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
QUICK = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def corrupted(draw: st.DrawFn, content: bytes) -> bytes:
    """Return `content` with some pieces inserted, removed or repeated."""
    for _ in range(draw(st.integers(0, 5))):
        position = draw(st.integers(0, len(content)))
        piece = draw(st.sampled_from(PIECES))
        num_removed = draw(st.integers(0, 5))
        content = (
            content[:position] + piece * draw(st.integers(0, 2)) + content[position + num_removed :]
        )
    return content


def assert_reads_or_raises(path: Path, options: ReadOptions) -> None:
    for mode in ("error", "skip"):
        try:
            table = load_table(path, mode, options)  # type: ignore[arg-type]
        except InputError as error:
            problems = error.problems
        else:
            problems = []
        assert all(str(path) in problem for problem in problems)
        if problems:
            continue
        assert all(type(row) is dict for row in table.rows)
        assert sorted(set(table.lines)) == list(table.lines)
        chunks = list(open_reader(path, options).chunks())
        if mode == "error":
            assert [row for chunk in chunks for row in chunk.rows] == list(table.rows)


@QUICK
@given(data=st.data())
def test_corrupted_text_is_read_or_raises(data, tmp_path):
    suffix = data.draw(st.sampled_from(sorted(SEEDS)))
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data.draw(corrupted(data.draw(st.sampled_from(SEEDS[suffix])))))
    formats = (None, None, "csv", "tsv", "jsonl", "json", "txt", "conll")
    assert_reads_or_raises(path, ReadOptions(data.draw(st.sampled_from(formats))))


@QUICK
@given(data=st.data())
def test_corrupted_compressed_file_is_read_or_raises(data, tmp_path):
    end = data.draw(st.sampled_from(sorted(COMPRESSORS)))
    path = tmp_path / f"x.jsonl{end}"
    path.write_bytes(data.draw(corrupted(COMPRESSORS[end](SEEDS[".jsonl"][0] * 20))))
    assert_reads_or_raises(path, ReadOptions())


@functools.cache  # its bytes contain the time
def workbook() -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book, content = openpyxl.Workbook(), io.BytesIO()
    book.active.append(["text", "n"])
    book.active.append(["a", 1])
    book.save(content)
    return content.getvalue()


@QUICK
@given(data=st.data())
def test_corrupted_workbook_is_read_or_raises(data, tmp_path):
    path = tmp_path / "x.xlsx"
    path.write_bytes(data.draw(corrupted(workbook())))
    assert_reads_or_raises(path, ReadOptions())
