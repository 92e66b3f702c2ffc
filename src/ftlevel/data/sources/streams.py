"""Streams of chunks of rows, each with a cursor to resume from, and the base class of file readers.

A cursor is a dict of plain values: byte and line of a text file, row of a Parquet row group, or the
state of a `datasets.IterableDataset`. Resuming re-reads nothing except the current Parquet row
group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from ftlevel.data.sources.table import BadRow, Row, Table, find_inconsistent_rows
from ftlevel.errors import InputError, join_names

Cursor = Mapping[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Rows of a source with their `lines`, counted in `unit`, and the `cursor` after them.

    `bad` lists the rows that could not be read.
    """

    rows: list[Row]
    lines: list[int]
    bad: list[BadRow]
    source: str
    unit: Literal["line", "row"]
    cursor: Cursor
    text_cells: bool = False

    @property
    def table(self) -> Table:
        """The rows as a table."""
        return Table(self.rows, self.lines, self.source, self.unit, text_cells=self.text_cells)


class Stream(Protocol):
    """A source of chunks."""

    @property
    def null_keys(self) -> Counter[str]:
        """Number of null keys dropped so far, by path."""

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks after `cursor`; None starts at the beginning."""


class Reader(ABC):
    """Reader of one file format. The constructor validates the format and reads no rows.

    Attributes:
        in_parts: whether the file can be read in parts, as `--streaming` requires.
        uniform: whether the format guarantees the same keys and types in all rows.
        text_cells: whether lists and objects can occur only as JSON text.
        shown: file name in messages; `path` may be a decompressed copy.
        null_keys: number of null keys dropped so far, by path.
        ignored: columns of the schema that are not read.
    """

    unit: Literal["line", "row"] = "line"
    in_parts: ClassVar[bool] = True
    uniform: ClassVar[bool] = False
    text_cells: ClassVar[bool] = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label_names: Mapping[str, tuple[str, ...]] = {}
        self.schema: Any = None
        self.shown = str(path)
        self.notes: list[str] = []
        self.null_keys: Counter[str] = Counter()
        self.ignored: tuple[str, ...] = ()

    @abstractmethod
    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks after `cursor`; None starts at the beginning."""

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks after `cursor`; raise `InputError` if the file is damaged."""
        with wrap_read_errors(self.path, self.shown):
            yield from self.read(cursor)

    def share(self, chunk: Chunk) -> float | None:
        """Return the fraction of the file read up to the end of `chunk`, or None if unknown."""
        size = self.path.stat().st_size
        return min(1.0, chunk.cursor["at"] / size) if size and "at" in chunk.cursor else None

    def chunk(self, rows: list[Row], lines: list[int], bad: list[BadRow], cursor: Cursor) -> Chunk:
        """Return a chunk of this file."""
        return Chunk(rows, lines, bad, self.shown, self.unit, cursor, self.text_cells)

    def collect(self) -> tuple[Table, list[BadRow]]:
        """Return all rows as a table, and the bad rows, including those that differ from most."""
        rows: list[Row] = []
        lines: list[int] = []
        bad: list[BadRow] = []
        for chunk in self.chunks():
            rows += chunk.rows
            lines += chunk.lines
            bad += chunk.bad
        odd = [] if self.uniform else find_inconsistent_rows(rows, lines)
        return self.table(rows, lines), [*bad, *odd]

    def table(self, rows: Sequence[Row], lines: Sequence[int]) -> Table:
        """Return a table of rows of this file."""
        return Table(
            rows,
            lines,
            self.shown,
            self.unit,
            label_names=self.label_names,
            notes=(*self.notes, *describe_null_keys(self.null_keys, self.shown)),
            text_cells=self.text_cells,
            ignored=self.ignored,
        )


@contextmanager
def wrap_read_errors(path: Path, shown: str = "") -> Iterator[None]:
    """Convert `OSError` to `InputError`, and replace `path` by `shown` in error messages."""
    shown = shown or str(path)
    try:
        yield
    except OSError as error:
        raise InputError(f"{shown}: cannot be read ({error.strerror or error}).") from error
    except InputError as error:
        if str(path) == shown:
            raise
        raise InputError([p.replace(str(path), shown) for p in error.problems]) from None


def describe_null_keys(null_keys: Counter[str], source: str) -> list[str]:
    """Return a note on the dropped null keys; empty if there are none."""
    if not null_keys:
        return []
    inner_first = sorted(null_keys, key=lambda path: (-path.count("."), path))
    return [
        f"{source}: dropped {null_keys.total():,} null keys of objects in lists, as Arrow gives "
        f"all objects of a list the same keys ({join_names(inner_first, 4)}); JSON Lines keeps "
        "nulls"
    ]


class ChainedStream:
    """Several streams read one after the other."""

    def __init__(self, streams: Iterable[Stream]) -> None:
        self._streams = list(streams)

    @property
    def null_keys(self) -> Counter[str]:
        """Number of null keys dropped in all streams, by path."""
        return sum((stream.null_keys for stream in self._streams), Counter())

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks after `cursor`."""
        first, inner = (cursor["stream"], cursor["cursor"]) if cursor else (0, None)
        for number, stream in enumerate(self._streams[first:], first):
            for found in stream.chunks(inner):
                yield replace(found, cursor={"stream": number, "cursor": found.cursor})
            inner = None
