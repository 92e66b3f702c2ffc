"""Readers of CSV, TSV and Excel's .xlsx. All cells are strings.

Excel cells have the value without its number format; dates are ISO 8601. Formulas have their saved
value.
"""

from __future__ import annotations

import contextlib
import csv
import math
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import long_cells
from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.readers.text import TextLines, TextReader, head_lines
from ftlevel.data.sources.streams import Chunk, Reader
from ftlevel.data.sources.table import to_float
from ftlevel.errors import InputError, did_you_mean, join_names, quote


class CsvReader(TextReader):
    """Reader of CSV files; without a header, the columns are called 1, 2, …."""

    uniform = True
    text_cells = True
    separator = ","

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._header, line, self._begin = self._read_header()
        if other := self._detect_delimiter():
            self.separator = other
            self.notes.append(f"its header is separated by {other!r}, and so are its rows")
            self._header, line, self._begin = self._read_header()
        if reason := has_no_header(self._header, self._sample(self.separator)):
            self._header = [str(number) for number in range(1, len(self._header) + 1)]
            self._begin = (0, 0)
            self.notes.append(
                f"no header: {reason}; the columns are called {join_names(self._header, 3)}. "
                "If it is one, give its columns other names"
            )
        check_header(self._header, f"{path}:{line}")

    def _read_header(self) -> tuple[list[str], int, tuple[int, int]]:
        text = TextLines(self.path, universal=True)
        cells = csv.reader(text, delimiter=self.separator, strict=True)
        with long_cells():
            try:
                header = next((row for row in cells if row), [])
            except csv.Error as error:
                raise InputError(_describe(error, self.path, 1)) from None
        return header, cells.line_num, (text.offset(cells.line_num), cells.line_num)

    def _detect_delimiter(self) -> str:
        """Returns the delimiter that the file seems to use instead of the format's own; or ""."""
        header, rows = self._header, self._sample(self.separator)
        others = [delimiter for delimiter in ";\t,|" if delimiter != self.separator]
        if len(header) == 1:
            return next((delimiter for delimiter in others if delimiter in header[0]), "")
        if all(len(row) == len(header) for row in rows):
            return ""
        text = self.separator.join(header)
        for delimiter in others:
            widths = {len(row) for row in self._sample(delimiter)}
            if delimiter in text and widths == {text.count(delimiter) + 1}:
                return delimiter
        return ""

    def _sample(self, delimiter: str) -> list[list[str]]:
        rows: list[list[str]] = []
        with contextlib.suppress(csv.Error):
            rows += csv.reader(head_lines(self.path), delimiter=delimiter)
        return [row for row in rows if row][1:]

    def read(self) -> Iterator[Chunk]:
        at, before = self._begin
        text = TextLines(self.path, at, before, universal=True)
        cells = csv.reader(text, delimiter=self.separator, strict=True)
        header, width = self._header, len(self._header)
        begin, more = before + 1, True
        while more:
            chunk, start = Chunk(), begin
            with long_cells():
                try:
                    for row in islice(cells, CHUNK_ROWS):
                        if len(row) == width:
                            chunk.add(begin, dict(zip(header, row, strict=True)))
                        elif row:
                            message = f"has {len(row)} cells, but the header has {width}"
                            chunk.add(begin, None, message)
                        begin = before + cells.line_num + 1
                except csv.Error as error:
                    raise InputError(_describe(error, self.path, begin)) from None
            more = begin > start
            if chunk.rows or chunk.errors:
                chunk.end = text.offset(begin - 1)
                yield chunk


class TsvReader(CsvReader):
    """Reader of TSV files; quoting works as in CSV."""

    separator = "\t"


def _describe(error: csv.Error, path: Path, line: int) -> str:
    if "end of data" in str(error):
        return f'{path}:{line}: a quote (") is opened in this row and never closed. Close it.'
    return (
        f"{path}:{line}: not valid CSV ({error}). "
        'Put quotes around the whole cell and double (") those inside it.'
    )


def check_header(header: list[str], location: str) -> None:
    """Raise `InputError` if a column name is empty or occurs twice; `location` is for messages."""
    repeated = sorted(name for name, count in Counter(header).items() if count > 1 and name)
    if repeated:
        raise InputError(
            f"{location}: the header has {join_names(map(quote, repeated))} twice. Rename one of "
            "them."
        )
    if "" in header:
        number = header.index("") + 1
        pandas = " It looks like a pandas index: write with index=False." if number == 1 else ""
        raise InputError(
            f"{location}: column {number} of the header has no name.{pandas} Name every column."
        )


def has_no_header(header: list[str], rows: list[list[str]]) -> str:
    """Returns why the first line looks like a row rather than a header, or ""."""
    rows = [row for row in rows if len(row) == len(header)]
    pandas_names = [str(number) for number in range(len(header))]
    if not rows or len(header) < 2 or header in rows or header == pandas_names:
        return ""
    for number, cell in enumerate(header):
        below = [row[number] for row in rows]
        if _is_number(cell) and all(map(_is_number, below)):
            return f"column {number + 1} of line 1, {cell!r}, is a number as in the rows below"
        if cell and below.count(cell) > 1:
            return f"{cell[:40]!r} of line 1 also occurs in {below.count(cell)} of the rows below"
    return ""


def _is_number(cell: str) -> bool:
    return math.isfinite(to_float(cell))


# Exceptions that pandas, openpyxl and their dependencies raise for corrupted files.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
)


class ExcelReader(Reader):
    """Reader of one sheet of a workbook, by pandas; default is the first sheet."""

    unit = "row"
    uniform = True
    text_cells = True

    def __init__(self, path: Path, sheet: str | None = None) -> None:
        super().__init__(path)
        rows = enumerate(self._load_cells(sheet), 1)
        self._rows = [(number, trimmed) for number, row in rows if (trimmed := _trim(row))]
        number, self._header = self._rows[0] if self._rows else (1, [])
        check_header(self._header, f"{path} row {number}")

    def read(self) -> Iterator[Chunk]:
        width = len(self._header)
        for start in range(1, len(self._rows), CHUNK_ROWS):
            chunk = Chunk()
            for number, cells in self._rows[start : start + CHUNK_ROWS]:
                if len(cells) > width:
                    message = f"has {len(cells)} cells, but the header has {width}"
                    chunk.add(number, None, message)
                elif _ERROR in cells:
                    message = f"column {cells.index(_ERROR) + 1} is an error, such as #N/A"
                    chunk.add(number, None, message)
                else:
                    texts = [*cells, *[""] * (width - len(cells))]
                    chunk.add(number, dict(zip(self._header, texts, strict=True)))
            yield chunk

    def _load_cells(self, sheet: str | None) -> list[list[Any]]:
        import pandas as pd

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about styles, which do not affect the text
                with pd.ExcelFile(self.path, engine="openpyxl") as book:
                    name = self._select_sheet([str(each) for each in book.sheet_names], sheet)
                    frame = book.parse(name, header=None, dtype=object, na_filter=False)
                    cells: list[list[Any]] = frame.to_numpy().tolist()
                    return cells
        except ImportError:
            raise InputError(
                f"{self.path}: .xlsx needs openpyxl, which is not installed. Install it: "
                "pip install 'ftlevel[xlsx]'"
            ) from None
        except _DAMAGE as error:
            first = str(error).partition("\n")[0].rstrip(".")
            raise InputError(
                f"{self.path}: not a readable .xlsx file ({first}). Is it password protected, or "
                "of another format? Save it again as .xlsx or .csv."
            ) from None

    def _select_sheet(self, names: list[str], sheet: str | None) -> str:
        if not names:
            raise InputError(f"{self.path}: has no sheet with cells. Give one with rows.")
        if sheet is None and len(names) > 1:
            first = f"sheet {names[0]!r}, the first of {join_names(names)}; --subset another"
            self.notes.append(first)
        if sheet is not None and sheet not in names:
            raise InputError(
                f"--subset {sheet}: {self.path} has no such sheet.{did_you_mean(sheet, names)} "
                f"Sheets: {join_names(names)}."
            )
        return names[0] if sheet is None else sheet


_ERROR = "\0"  # of a cell, such as #N/A, which pandas reads as NaN


def _trim(row: list[Any]) -> list[str]:
    """Returns the cells as texts, without empty ones at the end."""
    texts = list(map(_to_text, row))
    while texts and not texts[-1]:
        texts.pop()
    return texts


def _to_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return _ERROR if math.isnan(value) else f"{value:.15g}"
    return str(value).removesuffix(" 00:00:00") if isinstance(value, datetime) else str(value)
