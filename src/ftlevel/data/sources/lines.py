"""Rows of a JSON Lines file, read again when they are asked for: nothing is held for a row.

What is kept is the place of every 64th line, and the number of each line that is no row.
"""

from __future__ import annotations

import json
import os
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ftlevel.data.sources.computed import Computed
from ftlevel.errors import InputError

Row = dict[str, Any]
PART = 64
"""Lines, or rows, that are read and encoded together; the place of each part of a file is kept."""
LARGE_BYTES = 1_000_000
"""Size from which on the rows of a file are not held in memory."""
_BLOCK = 1 << 16  # bytes that are read at once
_raw_decode = json.JSONDecoder().raw_decode


def as_row(value: Any) -> Any:
    """Return a pair such as spaCy's `["text", {"entities": […]}]` as an object; else the value."""
    if type(value) is list and len(value) == 2:
        text, more = value
        if type(text) is str and type(more) is dict and "text" not in more:
            return {"text": text, **more}
    return value


class LineNumbers(Computed[int]):
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

    def _item(self, at: int) -> int:
        return at + 1 + bisect_right(self._gaps, at + 1)


class LineRows(Computed[Row]):
    """Rows by the number of their lines; the lines were found to be good before.

    Args:
        path: of the file, which must not change meanwhile.
        lines: the 1-based line of each row.
        places: in bytes, of line 1, 65, 129 and so on: the cursors of the file's chunks.
    """

    def __init__(self, path: Path, lines: Sequence[int], places: Sequence[int]) -> None:
        self.path, self.lines, self.places = path, lines, places
        self._next = (1, places[0]) if places else (1, 0)  # the line after the last one read
        self._block, self._at = b"", 0  # bytes that were read, and where they begin
        # Not a mapping: a file that is cut meanwhile would end the process by a signal.
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self.lines)

    def _item(self, at: int) -> Row:
        return self._read(self.lines[at])

    def __iter__(self) -> Iterator[Row]:
        """Decode one row after another."""
        return map(self._read, self.lines)

    def _read(self, line: int) -> Row:
        at, begin = self._next
        if not 0 <= line - at < PART:
            at, begin = line - (line - 1) % PART, self.places[(line - 1) // PART]
        while at < line:
            begin = self._end(begin) + 1
            at += 1
        end = self._end(begin)
        self._next = (line + 1, end + 1)
        text = self._block[begin - self._at : end - self._at].decode(errors="replace")
        try:
            row = as_row(_raw_decode(text.lstrip())[0])
        except ValueError:
            row = None
        if type(row) is not dict:
            raise InputError(f"{self.path}:{line}: changed while it was read. Run again.")
        return row

    def _end(self, begin: int) -> int:
        """Return where the line ends that begins at `begin`, which is in the block afterwards."""
        found = self._block.find(b"\n", begin - self._at) if begin >= self._at else -1
        size = _BLOCK
        while found < 0:
            self._block, self._at = os.pread(self._file, size, begin), begin
            found = self._block.find(b"\n")
            if found < 0 and len(self._block) < size:  # the last line may lack its end
                found = len(self._block)
            size *= 2
        return self._at + found

    def take(self, indices: Iterable[int]) -> LineRows:
        """Return the rows at `indices`, of the same file, for eight bytes a row."""
        return LineRows(self.path, array("q", (self.lines[i] for i in indices)), self.places)
