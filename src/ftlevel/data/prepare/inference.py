"""Rows without an answer as they come: each with its place, and what the task asks of it.

The same way as of a row that is learned from, as far as it goes: source, format, example. Nothing
is left out: a row that cannot be asked about has its reason instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from ftlevel.data.formats.detect import Format
from ftlevel.data.formats.roles import Roles
from ftlevel.data.formats.turns import Unusable
from ftlevel.data.sources.in_memory import iterate_rows
from ftlevel.data.sources.readers.files import Reading, is_pattern, match_files, open_reader
from ftlevel.data.sources.streams import Chunk, Reader
from ftlevel.data.sources.table import Row, Table
from ftlevel.errors import InputError, listing, quote

_FIRST = 64  # rows by which the columns are known


@dataclass(frozen=True)
class AskedRow:
    """A row.

    Attributes:
        row: as it was read; of a place that gave no row, null in every column.
        place: `file:line`.
        question: what the task makes of it; None where it cannot.
        fault: why not, without a full stop.
        share: which part of the source is read behind it, from 0 to 1, where that is known.
    """

    row: Row
    place: str
    question: Any = None
    fault: str = ""
    share: float | None = None


class RowSource(Protocol):
    """Where rows come from.

    Attributes:
        columns: names, by the first rows.
        leading: those of the first row, by which it is known what to ask.
        first: the first rows.
        schema: Arrow's, where the types are declared; else None.
    """

    columns: Sequence[str]
    leading: Sequence[str]
    first: Sequence[Row]
    schema: Any

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield each row, its place, what is wrong with it, and which part is read behind it."""


class FileRows:
    """The rows of a file; the first are read when it is made, to know its columns.

    Args:
        reader: of the file.
        ignored: columns that are not asked about.

    Raises:
        InputError: it is not there, of no known format, damaged or empty.
    """

    def __init__(self, reader: Reader, ignored: Sequence[str] = ()) -> None:
        self._reader = reader
        self.schema = reader.schema
        self.columns: Sequence[str] = self.schema.names if self.schema is not None else []
        chunk = next(self._reader.chunks(), None)
        if chunk is None or not (chunk.rows or chunk.bad):
            raise InputError(f"{reader.shown}: has 0 rows. Give a file with rows.")
        if not chunk.rows:
            first = chunk.bad[0]
            raise InputError(f"{self._place(chunk, first.line)}: {first.reason}. Fix the file.")
        if not self.columns:
            self.columns = list(dict.fromkeys(name for row in chunk.rows for name in row))
        self.leading: Sequence[str] = [name for name in chunk.rows[0] if name not in ignored]
        self.first: Sequence[Row] = chunk.rows

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield the rows in the order of the file, a place that gave none at its own."""
        for chunk in self._reader.chunks():
            share = self._reader.share(chunk)
            found: list[tuple[int, Row | None, str]] = [
                *((line, row, "") for line, row in zip(chunk.lines, chunk.rows, strict=True)),
                *((bad.line, None, bad.reason) for bad in chunk.bad),
            ]
            for line, row, fault in sorted(found, key=lambda item: item[0]):
                yield row, self._place(chunk, line), fault, share

    def _place(self, chunk: Chunk, line: int) -> str:
        return Table([], [], self._reader.shown, chunk.unit).place(line)


class ChainedRows:
    """The rows of several files, one after the other.

    Raises:
        InputError: their columns differ.
    """

    def __init__(self, files: Sequence[FileRows], names: Sequence[str]) -> None:
        self._files, first = files, files[0]
        self.columns, self.leading, self.first = first.columns, first.leading, first.first
        self.schema = first.schema if all(file.schema is not None for file in files) else None
        for file, name in zip(files, names, strict=True):
            if set(file.columns) != set(first.columns):
                raise InputError(
                    f"{name}: has the columns {listing(map(quote, file.columns))}, and {names[0]} "
                    f"has {listing(map(quote, first.columns))}. Files that are read together need "
                    "the same columns."
                )

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield the rows in the order of the files."""
        for number, file in enumerate(self._files):
            for row, place, fault, share in file.read():
                done = None if share is None else (number + share) / len(self._files)
                yield row, place, fault, done


def open_rows(name: str, how: Reading) -> tuple[RowSource, Reader]:
    """Return the rows of a file, or of all files that a pattern matches, and the first file.

    Raises:
        InputError: as of `open_reader` and `match_files`.
    """
    names = match_files(name, how.format) if is_pattern(name) else [name]
    readers = [open_reader(each, how) for each in names]
    files = [FileRows(reader, how.ignored) for reader in readers]
    shown = [reader.shown for reader in readers]
    return (files[0] if len(files) == 1 else ChainedRows(files, shown)), readers[0]


class GivenRows:
    """Rows that a program hands over, as of `iterate_rows`.

    Args:
        rows: the rows.
        ignored: columns that are not asked about.

    Raises:
        InputError: there are none.
    """

    schema = None

    def __init__(self, rows: Any, ignored: Sequence[str] = ()) -> None:
        self._rows = iterate_rows(rows, "predict")
        self.first: Sequence[Row] = list(islice(self._rows, _FIRST))
        if not self.first:
            raise InputError("there are 0 rows to predict. Give some.")
        self.columns: Sequence[str] = list(dict.fromkeys(n for row in self.first for n in row))
        self.leading: Sequence[str] = [name for name in self.first[0] if name not in ignored]

    def read(self) -> Iterator[tuple[Row | None, str, str, float | None]]:
        """Yield the rows, once."""
        for number, row in enumerate(self.first, 1):
            yield row, f"row {number}", "", None
        for number, row in enumerate(self._rows, len(self.first) + 1):
            yield row, f"row {number}", "", None


@dataclass(frozen=True)
class Questions:
    """The rows of a source as a task asks them.

    Attributes:
        source: where they come from.
        shape: what the columns are.
        fixed: whether a row may have no column beside those of the first ones.
        limit: how many rows there are at most.
    """

    source: RowSource
    shape: Format
    fixed: bool = False
    limit: int | None = None

    def __iter__(self) -> Iterator[AskedRow]:
        """Yield all rows in order."""
        known = frozenset(self.source.columns)
        roles = Roles(self.shape, Table([], [], ""))
        for row, place, fault, share in islice(self.source.read(), self.limit):
            yield replace(self._ask(row, place, fault, roles, known), share=share)

    def _ask(
        self, row: Row | None, place: str, fault: str, roles: Roles, known: frozenset[str]
    ) -> AskedRow:
        if row is None:
            return AskedRow(dict.fromkeys(self.source.columns), place, None, fault)
        if self.fixed and not row.keys() <= known:
            more = listing(quote(name) for name in row if name not in known)
            return AskedRow(row, place, None, f"has {more}, which the first rows lack")
        roles.turn_to(row, 0)
        try:
            return AskedRow(row, place, self.shape.build(roles))
        except Unusable as error:
            return AskedRow(row, place, None, str(error))


def windows(rows: Iterator[AskedRow], size: int) -> Iterator[list[AskedRow]]:
    """Yield `rows` in lists of `size`; the last one may be shorter."""
    while window := list(islice(rows, size)):
        yield window
