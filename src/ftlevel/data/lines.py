"""Rows of a large JSON Lines file, read again when they are asked for: sixteen bytes a row held."""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

Row = dict[str, Any]
LARGE_BYTES = 32_000_000
"""Size from which on the rows of a file are not held in memory."""
_BOM = b"\xef\xbb\xbf"


class LineRows(Sequence[Row]):
    """Rows by the place of their lines; the lines were found to be good before.

    Args:
        path: of the file, which must not change meanwhile.
        offsets: in bytes, of each row's line.
    """

    def __init__(self, path: Path, offsets: Iterable[int] = ()) -> None:
        self.path = path
        self.offsets = array("q", offsets)
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Decode a row, or several as a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin = self.offsets[index]
        end = self._bytes.find(b"\n", begin)
        row: Row = json.loads(self._bytes[begin : end if end >= 0 else None])
        return row

    def take(self, indices: Sequence[int]) -> LineRows:
        """Return the rows at `indices`, of the same file."""
        return LineRows(self.path, (self.offsets[i] for i in indices))


def read_lines(path: Path, place: list[int]) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, each after its offset was put into `place` (mutated).

    Raises:
        UnicodeDecodeError: a line is not UTF-8.
    """
    with path.open("rb") as file:
        at = 0
        for line in file:
            skipped = len(_BOM) if not at and line.startswith(_BOM) else 0
            place[0] = at + skipped
            at += len(line)
            yield line[skipped:].decode("utf-8")
