"""CSV and TSV with a header line; quotes work as in CSV, also between tabs. Cells stay strings."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.readers.text_lines import TextLines, check_head
from ftlevel.data.sources.streams import Chunk, Cursor, Reader
from ftlevel.data.sources.table import BadRow, Row
from ftlevel.errors import InputError, listing

# A cell longer than the csv module's 128 KiB is an ordinary document. The limit is global.
_LONGEST = min(sys.maxsize, 2**31 - 1)


class CommaSeparated(Reader):
    """Cells between commas; the header is read when the file is opened."""

    uniform = True
    separator = ","

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        check_head(path)
        text = TextLines(path, universal=True)
        cells = csv.reader(text, delimiter=self.separator, strict=True)
        limit = csv.field_size_limit(_LONGEST)
        try:
            self._header = next((row for row in cells if row), [])
        except csv.Error as error:
            raise InputError(_describe(error, path, 1)) from None
        finally:
            csv.field_size_limit(limit)
        _check_header(self._header, f"{path}:{cells.line_num}", self.separator)
        self._begin = text.cursor(cells.line_num)

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
            limit = csv.field_size_limit(_LONGEST)
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
            finally:
                csv.field_size_limit(limit)
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


def _check_header(header: list[str], place: str, separator: str) -> None:
    """Raise unless the header names every column, once."""
    twice = sorted({name for name in header if header.count(name) > 1 and name})
    if twice:
        raise InputError(
            f"{place}: the header has {listing([repr(name) for name in twice])} twice. "
            "Give every column its own name."
        )
    if "" in header:
        number = header.index("") + 1
        pandas = " It looks like a pandas index: write with index=False." if number == 1 else ""
        raise InputError(
            f"{place}: column {number} of the header has no name.{pandas} Name every column."
        )
    if len(header) == 1:
        other = next((mark for mark in ";\t,|" if mark != separator and mark in header[0]), None)
        if other:
            raise InputError(
                f"{place}: one column, named {header[0]!r}: the file is separated by {other!r}, "
                f"not {separator!r}. " + ("Rename it to .tsv." if other == "\t" else "Convert it.")
            )
