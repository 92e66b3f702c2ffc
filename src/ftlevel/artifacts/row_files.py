"""JSON Lines, CSV and TSV, appended to; what was cut off in the middle of a row is cut off."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

from ftlevel.artifacts.rows.sinks import Row, RowColumns, RowFile, describe_columns
from ftlevel.artifacts.rows.values import to_cell, to_json
from ftlevel.errors import InputError

_LONGEST = min(sys.maxsize, 2**31 - 1)  # cells of any length are read back


class _TextFile(RowFile):
    """A file of text, of which the bytes behind the last whole row are cut off."""

    def __init__(self, path: Path, columns: RowColumns) -> None:
        super().__init__(path, columns)
        self._file: IO[str] | None = None
        self._ends: int = 0  # byte behind the last row that was read back, or behind the header

    def open(self, keep: int) -> None:  # noqa: ARG002 - `read_back` has seen where they end
        """Begin to write behind the first `keep` rows."""
        there = self.existing
        if there is None or not self._ends:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mode = "x" if there is None else "w"
            self._file = self.partial.open(mode, encoding="utf-8", newline="")
            self._begin()
            return
        if there == self.path:
            self.path.replace(self.partial)
        os.truncate(self.partial, self._ends)
        self._file = self.partial.open("a", encoding="utf-8", newline="")

    def _begin(self) -> None:
        """Write what comes before the first row."""

    def _put(self, text: str) -> None:
        if self._file is None:
            raise RuntimeError("the file is not open")
        self._file.write(text)
        self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class JsonLinesFile(_TextFile):
    """An object a line."""

    is_table = False

    def read_back(self) -> Iterator[Any]:
        """Yield the objects of whole lines, without what was added."""
        there = self.existing
        if there is None:
            return
        with there.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                except ValueError:
                    return
                missing = [name for name in self.columns.answers if name not in row]
                if missing:
                    raise InputError(describe_columns(there, missing))
                self._ends += len(line)
                yield {k: v for k, v in row.items() if k not in self.columns.answers}

    def as_written(self, row: Row) -> Any:
        """Return the row as JSON gives it back."""
        return json.loads(to_json(row))

    def write(self, rows: Sequence[Row]) -> None:
        """Write a line a row."""
        self._put("".join(to_json(row) + "\n" for row in rows))


class CommaSeparatedFile(_TextFile):
    """Cells between commas, below a header."""

    separator: ClassVar[str] = ","

    @property
    def _header(self) -> list[str]:
        return [*self.columns.names, *self.columns.answers]

    def _begin(self) -> None:
        self._put(self._lines([self._header]))

    def read_back(self) -> Iterator[Any]:
        """Yield the cells of whole rows, without what was added."""
        there = self.existing
        if there is None:
            return
        width, limit = len(self.columns.names), csv.field_size_limit(_LONGEST)
        with there.open("rb") as file:
            taken = _Counted(file)
            cells = csv.reader(taken, delimiter=self.separator, strict=True)
            try:
                header = next(cells, None)
                if header is None or not taken.is_whole:
                    return
                if header != self._header:
                    raise InputError(describe_columns(there, header, self._header))
                self._ends = taken.bytes
                for row in cells:
                    if not taken.is_whole or len(row) != len(header):
                        return
                    self._ends = taken.bytes
                    yield row[:width]
            except (csv.Error, UnicodeDecodeError):
                return  # a row that was cut off inside quotes, or inside a character
            finally:
                csv.field_size_limit(limit)

    def as_written(self, row: Row) -> Any:
        """Return the cells of a row."""
        return [to_cell(row.get(name)) for name in self.columns.names]

    def write(self, rows: Sequence[Row]) -> None:
        """Write rows of cells."""
        self._put(self._lines([to_cell(row.get(name)) for name in self._header] for row in rows))

    def _lines(self, rows: Iterable[Sequence[str]]) -> str:
        text = io.StringIO()
        # With \r\n as its end of a line the module quotes cells with either of the two.
        writer = csv.writer(text, delimiter=self.separator, lineterminator="\r\n")
        lines = []
        for row in rows:
            text.seek(0)
            text.truncate()
            writer.writerow(row)
            lines.append(text.getvalue()[:-2] + "\n")
        return "".join(lines)


class TabSeparatedFile(CommaSeparatedFile):
    """Cells between tabs."""

    separator = "\t"


class _Counted:
    """The lines of a file, decoded, and how many bytes were taken."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.bytes = 0
        self.is_whole = False

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.bytes += len(line)
            self.is_whole = line.endswith(b"\n")
            yield line.decode("utf-8")
