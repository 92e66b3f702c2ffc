"""`key=value;key=value`, a row a line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.readers.text import TextLines
from ftlevel.data.sources.streams import Chunk, Cursor, Reader
from ftlevel.data.sources.table import BadRow, Row


class KeyValue(Reader):
    """`key=value;key=value`, a row a line."""

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        at = cursor or {"at": 0, "line": 0}
        text = TextLines(self.path, **at)
        taken, number = iter(text), int(at["line"])
        while some := list(islice(taken, CHUNK_ROWS)):
            rows: list[Row] = []
            lines: list[int] = []
            bad: list[BadRow] = []
            for number, line in enumerate(some, number + 1):  # noqa: B020
                pairs = [pair.split("=") for pair in line.strip().split(";")]
                if all(len(pair) == 2 for pair in pairs):
                    rows.append(dict(pairs))
                    lines.append(number)
                else:
                    bad.append(BadRow(number, "not key=value;key=value"))
            yield self.chunk(rows, lines, bad, text.cursor(number))
