"""Rows of a source as they come, some at a time, with a cursor to go on from after each part.

A cursor is plain values: a byte and a line of a text file, a row of a row group, or the state of a
`datasets.IterableDataset`. Going on from it reads nothing again but, of Parquet, the row group that
it lies in. Every container is read as strictly as `reader` reads it; what takes the whole file to
know, such as the form that most rows have, is taken from its first rows.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

from ftlevel.data.sources.json_rows import read_json_lines
from ftlevel.data.sources.reader import check_header, check_opening, describe_byte, describe_csv
from ftlevel.data.sources.table import BadRow, Row
from ftlevel.errors import InputError, listing

PART = 64
"""Rows, or lines, that are read and encoded together."""

Cursor = Mapping[str, Any]
STREAMED = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")


@dataclass(frozen=True)
class Chunk:
    """Some rows.

    Attributes:
        rows: those that could be read.
        lines: for each the line that it begins on, or its number in the source.
        bad: places that gave no row.
        source: what messages begin with.
        unit: what `lines` counts.
        cursor: where the next one begins.
    """

    rows: list[Row]
    lines: list[int]
    bad: list[BadRow]
    source: str
    unit: Literal["line", "row"]
    cursor: Cursor


class Stream(Protocol):
    """A source of chunks."""

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on; None is the beginning."""


def open_file(path: Path) -> Stream:
    """Return the stream of a local file.

    Raises:
        InputError: it is of no kind that can be streamed, or not what its name says.
    """
    suffix = path.suffix.lower()
    if suffix not in STREAMED:
        raise InputError(
            f"{path}: --streaming cannot read {suffix or 'a file without extension'!r} part by "
            f"part. It reads {listing(STREAMED)}. Convert the file, or drop --streaming."
        )
    if suffix == ".parquet":
        return ParquetStream(path)
    check_opening(path)
    if suffix == ".txt":
        return TextStream(path)
    return JsonStream(path) if suffix in (".jsonl", ".ndjson") else CsvStream(path)


class _Lines:
    """The lines of a UTF-8 file from a byte on, counted as they are taken."""

    def __init__(self, path: Path, at: int = 0, line: int = 0) -> None:
        self.path, self.at, self.line = path, at, line

    @property
    def cursor(self) -> Cursor:
        return {"at": self.at, "line": self.line}

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            file.seek(self.at)
            for raw in file:
                begin, self.at = self.at, self.at + len(raw)
                self.line += 1
                text = raw.removeprefix(b"\xef\xbb\xbf") if begin == 0 else raw
                try:
                    yield text.decode("utf-8")
                except UnicodeDecodeError as error:
                    offset = begin + len(raw) - len(text) + error.start
                    cut = error.reason == "unexpected end of data"
                    byte = text[error.start]
                    raise InputError(
                        describe_byte(self.path, self.line, byte, offset, cut=cut)
                    ) from None


class JsonStream:
    """JSON Lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        lines = _Lines(self.path, **(cursor or {}))
        for first, some in _parts(lines):
            raw = read_json_lines(some)
            bad = [BadRow(first + row.line, row.reason) for row in raw.bad]
            numbers = [first + line for line in raw.lines]
            yield Chunk(list(raw.rows), numbers, bad, str(self.path), "line", lines.cursor)


def _parts(lines: _Lines) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines in parts, each with the number of lines before it."""
    first, some = lines.line, []
    for line in lines:
        some.append(line)
        if len(some) == PART:
            yield first, some
            first, some = lines.line, []
    if some:
        yield first, some


class CsvStream:
    """CSV or TSV with a header line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._separator = "\t" if path.suffix.lower() == ".tsv" else ","
        lines = _Lines(path)
        reader = self._reader(lines)
        self._header = self._record(reader, 1) or []
        self._start = lines.cursor
        check_header(self._header, f"{path}:{lines.line}", self._separator)

    def _reader(self, lines: _Lines) -> Any:
        return csv.reader(iter(lines), delimiter=self._separator, strict=True)

    def _record(self, reader: Any, begin: int) -> list[str] | None:
        try:
            return next(reader, None)
        except csv.Error as error:
            raise InputError(describe_csv(error, str(self.path), begin)) from None

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        lines = _Lines(self.path, **(cursor or self._start))
        reader = self._reader(lines)
        cells: list[str] | None = []
        while cells is not None:
            rows: list[Row] = []
            numbers: list[int] = []
            bad: list[BadRow] = []
            with _long_cells():
                while len(rows) + len(bad) < PART:
                    begin = lines.line + 1
                    cells = self._record(reader, begin)
                    if cells is None:
                        break
                    if cells and len(cells) != len(self._header):
                        reason = f"has {len(cells)} cells, but the header has {len(self._header)}"
                        bad.append(BadRow(begin, reason))
                    elif cells:
                        rows.append(dict(zip(self._header, cells, strict=True)))
                        numbers.append(begin)
            if rows or bad:
                yield Chunk(rows, numbers, bad, str(self.path), "line", lines.cursor)


@contextmanager
def _long_cells() -> Iterator[None]:
    """Take a cell beyond the csv module's 128 KiB: an ordinary document. The limit is global."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


class TextStream:
    """Paragraphs of a text file: runs of lines without a blank one between them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        lines = _Lines(self.path, **(cursor or {}))
        rows: list[Row] = []
        numbers: list[int] = []
        run: list[str] = []
        for line in chain(lines, [""]):
            if line.strip():
                run.append(line.rstrip("\r\n"))
                continue
            if run:
                numbers.append(lines.line - len(run) + (line == ""))
                rows.append({"text": "\n".join(run)})
                run = []
            if len(rows) >= PART or (line == "" and rows):
                yield Chunk(rows, numbers, [], str(self.path), "line", lines.cursor)
                rows, numbers = [], []


class ParquetStream:
    """Row groups of a Parquet file."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowException as error:
            first = str(error).splitlines()[0].rstrip(".")
            raise InputError(
                f"{path}: not a readable Parquet file ({first}). "
                "Was the download or copy cut short? Fetch it again."
            ) from None

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        at = cursor or {"group": 0, "row": 0, "number": 0}
        skip, number = int(at["row"]), int(at["number"])
        for group in range(int(at["group"]), self._file.num_row_groups):
            row = 0
            for batch in self._file.iter_batches(PART, row_groups=[group]):
                row += batch.num_rows
                if row <= skip:
                    continue
                rows = batch.slice(max(0, batch.num_rows - (row - skip))).to_pylist()
                numbers = list(range(number + 1, number + 1 + len(rows)))
                number += len(rows)
                after = {"group": group, "row": row, "number": number}
                yield Chunk(rows, numbers, [], str(self.path), "row", after)
            skip = 0


class IterableStream:
    """A `datasets.IterableDataset`: of the Hub, or of a directory that `save_to_disk` wrote.

    Args:
        make: opens it anew, at its beginning.
        source: what messages begin with.
    """

    def __init__(self, make: Callable[[], Any], source: str) -> None:
        self._make, self.source = make, source

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        data, number = self._make(), 0
        if cursor is not None:
            data.load_state_dict(cursor["state"])
            number = int(cursor["number"])
        rows: list[Row] = []

        def chunk() -> Chunk:
            numbers = list(range(number - len(rows) + 1, number + 1))
            after = {"state": data.state_dict(), "number": number}
            return Chunk(rows, numbers, [], self.source, "row", after)

        for row in data:
            rows.append(row)
            number += 1
            if len(rows) == PART:
                yield chunk()
                rows = []
        if rows:
            yield chunk()


class ChainedStream:
    """Several streams, one after the other."""

    def __init__(self, streams: Iterable[Stream]) -> None:
        self._streams = list(streams)

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        first, inner = (cursor["stream"], cursor["cursor"]) if cursor else (0, None)
        for number, stream in enumerate(self._streams[first:], first):
            for found in stream.chunks(inner):
                after = {"stream": number, "cursor": found.cursor}
                yield Chunk(found.rows, found.lines, found.bad, found.source, found.unit, after)
            inner = None
