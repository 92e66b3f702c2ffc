"""Rows of a JSON Lines file, read again when they are asked for: nothing is held for a row.

What is kept is the place of every 64th line, and the number of each line that is no row.
"""

from __future__ import annotations

import json
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

Row = dict[str, Any]
LARGE_BYTES = 1_000_000
"""Size from which on the rows of a file are not held in memory."""
_STRIDE = 64  # lines from one place that is kept to the next
_BOM = b"\xef\xbb\xbf"
_raw_decode = json.JSONDecoder().raw_decode


class LineNumbers(Sequence[int]):
    """The lines of a file that are rows, by what is missing: memory does not grow with the rows."""

    def __init__(self) -> None:
        self._last = 0
        self._gaps = array("q")  # of each line that is no row: the rows before it, plus one

    def append(self, line: int) -> None:
        """Add a row; lines only grow."""
        for missing in range(self._last + 1, line):
            self._gaps.append(missing - len(self._gaps))
        self._last = line

    def __len__(self) -> int:
        return self._last - len(self._gaps)

    def __iter__(self) -> Iterator[int]:
        """Yield the lines of all rows."""
        begin = 1
        for before, gap in enumerate(self._gaps):
            yield from range(begin + before, gap + before)
            begin = gap
        yield from range(begin + len(self._gaps), self._last + 1)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        """Return the line of a row, or of several as a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(1, len(self) + 1)[index]
        return number + bisect_right(self._gaps, number)


class LineRows(Sequence[Row]):
    """Rows by the number of their lines; the lines were found to be good before.

    Args:
        path: of the file, which must not change meanwhile.
        lines: the 1-based line of each row.
        places: in bytes, of line 1, 65, 129 and so on.
    """

    def __init__(self, path: Path, lines: Sequence[int], places: Sequence[int]) -> None:
        self.path, self.lines, self.places = path, lines, places
        self._next = (1, places[0]) if places else (1, 0)  # the line after the last one read
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Decode a row, or several as a list."""
        if isinstance(index, slice):
            return [self._read(self.lines[i]) for i in range(*index.indices(len(self)))]
        return self._read(self.lines[index])

    def __iter__(self) -> Iterator[Row]:
        """Decode one row after another."""
        return map(self._read, self.lines)

    def _read(self, line: int) -> Row:
        at, begin = self._next
        if not 0 <= line - at < _STRIDE:
            at, begin = line - (line - 1) % _STRIDE, self.places[(line - 1) // _STRIDE]
        find = self._bytes.find
        while at < line:
            begin = find(b"\n", begin) + 1
            at += 1
        end = find(b"\n", begin)
        end = end if end >= 0 else len(self._bytes)
        self._next = (line + 1, end + 1)
        row: Row
        row, _ = _raw_decode(self._bytes[begin:end].decode().lstrip())
        return row

    def take(self, indices: Iterable[int]) -> LineRows:
        """Return the rows at `indices`, of the same file, for eight bytes a row."""
        return LineRows(self.path, array("q", (self.lines[i] for i in indices)), self.places)


def read_lines(path: Path, places: array[int]) -> Iterator[str]:
    """Yield the lines of a UTF-8 file; the place of every 64th is added to `places` (mutated).

    Raises:
        UnicodeDecodeError: a line is not UTF-8.
    """
    with path.open("rb") as file:
        at = 0
        for number, line in enumerate(file):
            skipped = len(_BOM) if not at and line.startswith(_BOM) else 0
            if not number % _STRIDE:
                places.append(at + skipped)
            at += len(line)
            yield line[skipped:].decode("utf-8")
