"""Excel's .xlsx: a header row and the rows below it, each cell the text that Excel shows.

A number has the decimals of its cell's format, a date its order of day, month and year; where the
format is the reader's locale, a date is ISO's. Formulas give the value that was saved.
"""

from __future__ import annotations

import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.readers.separated import check_header
from ftlevel.data.sources.streams import Chunk, Cursor, Reader
from ftlevel.data.sources.table import BadRow, Row
from ftlevel.errors import InputError, did_you_mean, listing

# What openpyxl and the libraries below it raise for files that are cut or changed.
_DAMAGE = (zipfile.BadZipFile, zlib.error, LookupError, ValueError, TypeError, AttributeError,
           ArithmeticError, EOFError, SyntaxError, NotImplementedError, RuntimeError)  # fmt: skip
_NUMBER = re.compile(r"(?P<grouped>#,##)?0(?:\.(?P<decimals>0+))?(?P<percent>%)?")
_DATE_PART = re.compile(r"y+|m+|d+|h+|s+|AM/PM|[^ymdhs\\\"\[\];@]", re.IGNORECASE)
_CODES = {"yy": "%y", "yyyy": "%Y", "m": "{0.month}", "mm": "%m", "mmm": "%b", "mmmm": "%B",
          "d": "{0.day}", "dd": "%d", "ddd": "%a", "dddd": "%A"}  # fmt: skip


class Workbook(Reader):
    """A sheet of a workbook: the first one, or the one that is named."""

    unit = "row"
    uniform = True
    text_cells = True

    def __init__(self, path: Path, sheet: str | None = None) -> None:
        super().__init__(path)
        self._sheet = sheet
        self._header: list[str] = []
        self._begin = 0
        for number, cells in self._rows(1):
            self._header = [text for text, _ in cells]
            self._begin = number + 1
            break
        check_header(self._header, f"{path} row {self._begin - 1}")

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        rows: list[Row] = []
        numbers: list[int] = []
        bad: list[BadRow] = []
        width = len(self._header)
        number = begin = int(cursor["row"]) if cursor else self._begin
        for number, cells in self._rows(begin):
            fault = next((f"column {i} is the error {text}" for i, (text, is_error)
                          in enumerate(cells, 1) if is_error), "")  # fmt: skip
            if len(cells) > width:
                fault = f"has {len(cells)} cells, but the header has {width}"
            if fault:
                bad.append(BadRow(number, fault))
            else:
                texts = [text for text, _ in cells] + [""] * (width - len(cells))
                rows.append(dict(zip(self._header, texts, strict=True)))
                numbers.append(number)
            if len(rows) + len(bad) >= PART:
                yield self.chunk(rows, numbers, bad, {"row": number + 1})
                rows, numbers, bad = [], [], []
        if rows or bad:
            yield self.chunk(rows, numbers, bad, {"row": number + 1})

    def _rows(self, begin: int) -> Iterator[tuple[int, list[tuple[str, bool]]]]:
        """Yield the rows with something in them: number, and each cell's text and if it failed."""
        with _opened(self.path) as book:
            sheet = self._choose(book)
            sheet.reset_dimensions()
            for number, cells in enumerate(sheet.iter_rows(min_row=begin), begin):
                shown = [_show(cell) for cell in cells]
                while shown and not shown[-1][0]:
                    shown.pop()
                if shown:
                    yield number, shown

    def _choose(self, book: Any) -> Any:
        names = [sheet.title for sheet in book.worksheets]
        if not names:
            raise InputError(f"{self.path}: has no sheet with cells. Give one with rows.")
        name = self._sheet if self._sheet is not None else names[0]
        if name not in names:
            raise InputError(
                f"--subset {name}: {self.path} has no such sheet.{did_you_mean(name, names)} "
                f"Sheets: {listing(names)}."
            )
        if self._sheet is None and len(names) > 1 and not self.notes:
            self.notes.append(f"sheet {name!r}, the first of {listing(names)}; --subset another")
        return book[name]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a workbook; what is wrong with it is an `InputError`."""
    try:
        import openpyxl
    except ImportError:
        raise InputError(
            f"{path}: .xlsx needs openpyxl, which is not installed. Install it: "
            "pip install 'ftlevel[xlsx]'"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and the like, which no cell's text needs
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            yield book
        finally:
            book.close()
    except _DAMAGE as error:
        first = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"{path}: not a readable .xlsx file ({first}). Is it password protected, or of another "
            "format? Save it again as .xlsx or .csv."
        ) from None


def _show(cell: Any) -> tuple[str, bool]:
    """Return the text of a cell, and whether it is an error such as #N/A."""
    value = cell.value
    if value is None:
        return "", False
    form = (getattr(cell, "number_format", None) or "General").partition(";")[0]
    return show_value(value, form), getattr(cell, "data_type", "") == "e"


def show_value(value: Any, form: str) -> str:
    """Return the text of a value in a cell with the number format `form`."""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, (datetime, date, time)):
        return _show_date(value, form)
    if isinstance(value, timedelta):
        return str(value)
    if isinstance(value, (int, float)):
        return _show_number(value, form)
    return str(value)


def _show_number(value: int | float, form: str) -> str:
    found = _NUMBER.fullmatch(form)
    if found:
        decimals, comma = len(found["decimals"] or ""), "," if found["grouped"] else ""
        scaled = value * 100 if found["percent"] else value
        return f"{scaled:{comma}.{decimals}f}{found['percent'] or ''}"
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _show_date(value: date | time, form: str) -> str:
    """Return a date as its format orders it; ISO's where that is not just days and months."""
    parts = _DATE_PART.findall(form)
    codes = [_CODES.get(part.lower(), part) for part in parts]
    plain = "".join(parts) == form and form != "mm-dd-yy" and isinstance(value, date)
    if plain and not any(re.fullmatch("[hsy]+|AM/PM", code, re.IGNORECASE) for code in codes):
        return value.strftime("".join(codes)).format(value)
    if isinstance(value, datetime):
        midnight = value.time() == time()
        return value.date().isoformat() if midnight else value.isoformat(" ")
    return value.isoformat()
