"""Readers of CSV, TSV and Excel's .xlsx. All cells are strings.

Excel cells have the text that Excel displays: decimals and date order follow the cell's number
format, and dates in the locale's format become ISO dates. Formulas have their saved value.
"""

from __future__ import annotations

import contextlib
import csv
import math
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from itertools import islice
from pathlib import Path
from typing import Any

from ftlevel.artifacts.files import long_cells
from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.readers.text import TextLines, TextReader, head_lines
from ftlevel.data.sources.streams import Chunk, Reader
from ftlevel.data.sources.table import BadRow, Row, to_float
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
            rows: list[Row] = []
            lines: list[int] = []
            errors: list[BadRow] = []
            start = begin
            with long_cells():
                try:
                    for row in islice(cells, CHUNK_ROWS):
                        if len(row) == width:
                            rows.append(dict(zip(header, row, strict=True)))
                            lines.append(begin)
                        elif row:
                            message = f"has {len(row)} cells, but the header has {width}"
                            errors.append(BadRow(begin, message))
                        begin = before + cells.line_num + 1
                except csv.Error as error:
                    raise InputError(_describe(error, self.path, begin)) from None
            more = begin > start
            if rows or errors:
                yield Chunk(rows, lines, errors, text.offset(begin - 1))


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
    repeated = sorted({name for name in header if header.count(name) > 1 and name})
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


# Exceptions that openpyxl and its dependencies raise for corrupted files.
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
_NUMBER = re.compile(r"(?P<grouped>#,##)?0(?:\.(?P<decimals>0+))?(?P<percent>%)?")
_DATE_PART = re.compile(r"y+|m+|d+|h+|s+|AM/PM|[^ymdhs\\\"\[\];@]", re.IGNORECASE)
_CODES = {
    "yy": "%y",
    "yyyy": "%Y",
    "m": "{0.month}",
    "mm": "%m",
    "mmm": "%b",
    "mmmm": "%B",
    "d": "{0.day}",
    "dd": "%d",
    "ddd": "%a",
    "dddd": "%A",
}


class ExcelReader(Reader):
    """Reader of one sheet of a workbook; default is the first sheet."""

    unit = "row"
    uniform = True
    text_cells = True

    def __init__(self, path: Path, sheet: str | None = None) -> None:
        super().__init__(path)
        self._sheet = sheet
        number, cells = next(self._rows(1), (-1, []))
        self._header, self._begin = [text for text, _ in cells], number + 1
        check_header(self._header, f"{path} row {self._begin - 1}")

    def read(self) -> Iterator[Chunk]:
        rows: list[Row] = []
        numbers: list[int] = []
        errors: list[BadRow] = []
        width = len(self._header)
        for number, cells in self._rows(self._begin):
            texts = [text for text, _ in cells] + [""] * (width - len(cells))
            invalid = [i for i, (_, is_error) in enumerate(cells) if is_error]
            if len(cells) > width:
                message = f"has {len(cells)} cells, but the header has {width}"
                errors.append(BadRow(number, message))
            elif invalid:
                message = f"column {invalid[0] + 1} is the error {texts[invalid[0]]}"
                errors.append(BadRow(number, message))
            else:
                rows.append(dict(zip(self._header, texts, strict=True)))
                numbers.append(number)
            if len(rows) + len(errors) >= CHUNK_ROWS:
                yield Chunk(rows, numbers, errors)
                rows, numbers, errors = [], [], []
        if rows or errors:
            yield Chunk(rows, numbers, errors)

    def _rows(self, start: int) -> Iterator[tuple[int, list[tuple[str, bool]]]]:
        """Yields the number of each non-empty row from `start`, and (text, is_error) per cell."""
        with _opened(self.path) as book:
            sheet = self._select_sheet(book)
            sheet.reset_dimensions()
            for number, cells in enumerate(sheet.iter_rows(min_row=start), start):
                texts = [_format_cell(cell) for cell in cells]
                while texts and not texts[-1][0]:
                    texts.pop()
                if texts:
                    yield number, texts

    def _select_sheet(self, book: Any) -> Any:
        names = [sheet.title for sheet in book.worksheets]
        if not names:
            raise InputError(f"{self.path}: has no sheet with cells. Give one with rows.")
        name = self._sheet if self._sheet is not None else names[0]
        if name not in names:
            raise InputError(
                f"--subset {name}: {self.path} has no such sheet.{did_you_mean(name, names)} "
                f"Sheets: {join_names(names)}."
            )
        if self._sheet is None and len(names) > 1 and not self.notes:
            self.notes.append(f"sheet {name!r}, the first of {join_names(names)}; --subset another")
        return book[name]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import openpyxl
    except ImportError:
        raise InputError(
            f"{path}: .xlsx needs openpyxl, which is not installed. Install it: "
            "pip install 'ftlevel[xlsx]'"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about styles, which do not affect the text
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        with contextlib.closing(book):
            yield book
    except _DAMAGE as error:
        first = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"{path}: not a readable .xlsx file ({first}). Is it password protected, or of another "
            "format? Save it again as .xlsx or .csv."
        ) from None


def _format_cell(cell: Any) -> tuple[str, bool]:
    value = cell.value
    if value is None:
        return "", False
    number_format = (getattr(cell, "number_format", None) or "General").partition(";")[0]
    return format_value(value, number_format), getattr(cell, "data_type", "") == "e"


def format_value(value: Any, number_format: str) -> str:
    """Returns the text of a cell value in the number format."""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, (datetime, date, time)):
        return _format_date(value, number_format)
    match = _NUMBER.fullmatch(number_format)
    if isinstance(value, (int, float)) and match:
        decimals, comma = len(match["decimals"] or ""), "," if match["grouped"] else ""
        scaled = value * 100 if match["percent"] else value
        return f"{scaled:{comma}.{decimals}f}{match['percent'] or ''}"
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _format_date(value: date | time, number_format: str) -> str:
    """Returns a date in the cell's format; ISO 8601 if that has more than day, month and year."""
    parts = _DATE_PART.findall(number_format)
    codes = [_CODES.get(part.lower(), part) for part in parts]
    is_simple = "".join(parts) == number_format != "mm-dd-yy" and isinstance(value, date)
    if is_simple and not any(re.fullmatch("[hsy]+|AM/PM", code, re.IGNORECASE) for code in codes):
        return value.strftime("".join(codes)).format(value)
    if isinstance(value, datetime):
        midnight = value.time() == time()
        return value.date().isoformat() if midnight else value.isoformat(" ")
    return value.isoformat()
