"""A source as chunks of rows with a cursor after each, and a table as a stream that was collected.

A cursor is plain values: a byte and a line of a text file, a row of a row group, or the state of a
`datasets.IterableDataset`. Going on from it reads nothing again but, of Parquet, the row group that
it lies in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from ftlevel.data.sources.table import BadRow, Row, Table
from ftlevel.data.sources.uniform import find_odd_rows
from ftlevel.errors import InputError, listing

Cursor = Mapping[str, Any]


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
        text_cells: as of `Table`.
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
        """Paths of null keys that were dropped so far, with how often."""

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on; None is the beginning."""


class Reader(ABC):
    """One format of files. Opening one refuses what is not of the format; it reads no row.

    Attributes:
        unit: what the lines of its rows count.
        in_parts: whether a part can be read without the whole file, as `--streaming` does.
        uniform: whether the format itself gives all rows the same keys and types.
        text_cells: whether lists and objects can only be there as JSON text.
        label_names: names of the classes, for columns of which the file declares them.
        schema: Arrow's, where the file declares the types of its columns; else None.
        shown: what messages call the file, of which `path` may be an unpacked copy.
        notes: what was chosen in reading it, to be shown.
        null_keys: paths of null keys that were dropped so far, with how often.
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
        """Yield the chunks from `cursor` on; None is the beginning."""

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on; None is the beginning.

        Raises:
            InputError: naming the place past which no row can be trusted.
        """
        with refuse_unreadable(self.path, self.shown):
            yield from self.read(cursor)

    def share(self, chunk: Chunk) -> float | None:
        """Return which part of the file is read behind `chunk`, from 0 to 1, where it is known."""
        size = self.path.stat().st_size
        return min(1.0, chunk.cursor["at"] / size) if size and "at" in chunk.cursor else None

    def chunk(self, rows: list[Row], lines: list[int], bad: list[BadRow], cursor: Cursor) -> Chunk:
        """Return a chunk of this file."""
        return Chunk(rows, lines, bad, self.shown, self.unit, cursor, self.text_cells)

    def collect(self) -> tuple[Table, list[BadRow]]:
        """Return the rows of all chunks, and the bad ones, some of which stand in the table.

        Raises:
            InputError: as of `chunks`.
        """
        rows: list[Row] = []
        lines: list[int] = []
        bad: list[BadRow] = []
        for chunk in self.chunks():
            rows += chunk.rows
            lines += chunk.lines
            bad += chunk.bad
        odd = [] if self.uniform else find_odd_rows(rows, lines)
        return self.table(rows, lines), [*bad, *odd]

    def table(self, rows: Sequence[Row], lines: Sequence[int]) -> Table:
        """Return a table of rows of this file."""
        return Table(
            rows, lines, self.shown, self.unit, label_names=self.label_names,
            notes=(*self.notes, *describe_null_keys(self.null_keys, self.shown)),
            text_cells=self.text_cells, ignored=self.ignored,
        )  # fmt: skip


@contextmanager
def refuse_unreadable(path: Path, shown: str = "") -> Iterator[None]:
    """Turn what the system says about a file into an `InputError`, which calls it `shown`."""
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
    """Return a note on the null keys that were dropped; empty when none was."""
    if not null_keys:
        return []
    inner_first = sorted(null_keys, key=lambda path: (-path.count("."), path))
    return [
        f"{source}: dropped {null_keys.total():,} null keys of objects in lists, as Arrow gives "
        f"all objects of a list the same keys ({listing(inner_first, 4)}); JSON Lines keeps nulls"
    ]


class ChainedStream:
    """Several streams, one after the other."""

    def __init__(self, streams: Iterable[Stream]) -> None:
        self._streams = list(streams)

    @property
    def null_keys(self) -> Counter[str]:
        """Those of all streams."""
        return sum((stream.null_keys for stream in self._streams), Counter())

    def chunks(self, cursor: Cursor | None = None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        first, inner = (cursor["stream"], cursor["cursor"]) if cursor else (0, None)
        for number, stream in enumerate(self._streams[first:], first):
            for found in stream.chunks(inner):
                yield replace(found, cursor={"stream": number, "cursor": found.cursor})
            inner = None
