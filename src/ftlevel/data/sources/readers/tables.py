"""CSV and TSV with a header line; quotes work as in CSV, also between tabs. Cells stay strings."""

from __future__ import annotations

import contextlib
import csv
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.readers.beginnings import head_lines
from ftlevel.data.sources.readers.text_lines import TextLines, check_head
from ftlevel.data.sources.streams import Chunk, Cursor, Reader
from ftlevel.data.sources.table import BadRow, Row
from ftlevel.errors import InputError, listing, quote

# A cell longer than the csv module's 128 KiB is an ordinary document.
_LONGEST = min(sys.maxsize, 2**31 - 1)


class CommaSeparated(Reader):
    """Cells between commas; the header is read when the file is opened.

    A file without one has columns called 1, 2, …; one whose header holds no comma but another mark
    is read by that.
    """

    uniform = True
    text_cells = True
    separator = ","

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        check_head(path)
        self._header, line, after = self._read_header()
        if other := self._other_separator():
            self.separator = other
            self.notes.append(f"its header is separated by {other!r}, and so are its rows")
            self._header, line, after = self._read_header()
        if why := find_no_header(self._header, self._sample(self.separator)):
            self.notes.append(
                f"no header: {why}; the columns are called {columns_by_number(len(self._header))}. "
                "If it is one, give its columns other names"
            )
            self._header = [str(number) for number in range(1, len(self._header) + 1)]
            after = TextLines(path).cursor(0)
        check_header(self._header, f"{path}:{line}")
        self._begin = after

    def _read_header(self) -> tuple[list[str], int, Cursor]:
        """Return the cells of the first line, its number, and where the rows begin."""
        text = TextLines(self.path, universal=True)
        cells = csv.reader(text, delimiter=self.separator, strict=True)
        with _long_cells():
            try:
                header = next((row for row in cells if row), [])
            except csv.Error as error:
                raise InputError(_describe(error, self.path, 1)) from None
        return header, cells.line_num, text.cursor(cells.line_num)

    def _other_separator(self) -> str:
        """Return the mark that the file is separated by instead; "" where it is the usual one."""
        header, rows = self._header, self._sample(self.separator)
        marks = [mark for mark in ";\t,|" if mark != self.separator]
        if len(header) == 1:
            return next((mark for mark in marks if mark in header[0]), "")
        if all(len(row) == len(header) for row in rows if row):
            return ""
        first = self.separator.join(header)
        for mark in marks:
            width = first.count(mark) + 1
            others = self._sample(mark)
            if width > 1 and others and all(len(row) == width for row in others if row):
                return mark
        return ""

    def _sample(self, separator: str) -> list[list[str]]:
        """Return the whole rows behind the header of what the file begins with."""
        rows: list[list[str]] = []
        with contextlib.suppress(csv.Error):
            rows += csv.reader(head_lines(self.path), delimiter=separator)
        return [row for row in rows if row][1:]

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        at = cursor or self._begin
        text = TextLines(self.path, **at, universal=True)
        cells = csv.reader(text, delimiter=self.separator, strict=True)
        header, width, before = self._header, len(self._header), int(at["line"])
        begin, more = before + 1, True
        while more:
            rows: list[Row] = []
            lines: list[int] = []
            bad: list[BadRow] = []
            start = begin
            with _long_cells():
                try:
                    for row in islice(cells, PART):
                        if len(row) == width:
                            rows.append(dict(zip(header, row, strict=True)))
                            lines.append(begin)
                        elif row:
                            reason = f"has {len(row)} cells, but the header has {width}"
                            bad.append(BadRow(begin, reason))
                        begin = before + cells.line_num + 1
                except csv.Error as error:
                    raise InputError(_describe(error, self.path, begin)) from None
            more = begin > start
            if rows or bad:
                yield self.chunk(rows, lines, bad, text.cursor(begin - 1))


class TabSeparated(CommaSeparated):
    """Cells between tabs."""

    separator = "\t"


def _describe(error: csv.Error, path: Path, line: int) -> str:
    """Return the message for a quote that is out of place; the rows past it can't be trusted."""
    if "end of data" in str(error):
        return f'{path}:{line}: a quote (") is opened in this row and never closed. Close it.'
    return (
        f"{path}:{line}: not valid CSV ({error}). "
        'Put quotes around the whole cell and double (") those inside it.'
    )


def check_header(header: list[str], place: str) -> None:
    """Raise unless the header names every column, once."""
    twice = sorted({name for name in header if header.count(name) > 1 and name})
    if twice:
        raise InputError(
            f"{place}: the header has {listing(map(quote, twice))} twice. "
            "Give every column its own name."
        )
    if "" in header:
        number = header.index("") + 1
        pandas = " It looks like a pandas index: write with index=False." if number == 1 else ""
        raise InputError(
            f"{place}: column {number} of the header has no name.{pandas} Name every column."
        )


def find_no_header(header: list[str], rows: list[list[str]]) -> str:
    """Return what speaks for a first line that is a row as well; "" where it may be a header.

    Args:
        header: the cells of the first line.
        rows: some of those after it.
    """
    rows = [row for row in rows if len(row) == len(header)]
    counted = [str(number) for number in range(len(header))]  # as pandas names what has no name
    if not rows or len(header) < 2 or header in rows or header == counted:
        return ""
    for number, cell in enumerate(header):
        below = [row[number] for row in rows]
        if _is_number(cell) and all(map(_is_number, below)):
            return f"column {number + 1} of line 1, {cell!r}, is a number as in the rows below"
        if cell and below.count(cell) > 1:
            return f"{cell[:40]!r} of line 1 stands in {below.count(cell)} of the rows below too"
    return ""


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def columns_by_number(count: int) -> str:
    """Return the names of columns without names, for a message."""
    return listing([str(number) for number in range(1, count + 1)], 3)


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Let cells be as long as documents; the limit is global."""
    limit = csv.field_size_limit(_LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
