"""`key=value;key=value`, a row a line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.readers.text import TextLines
from ftlevel.data.sources.streams import Chunk, Reader


class KeyValue(Reader):
    """Reads files of `key=value;key=value` lines."""

    def read(self) -> Iterator[Chunk]:
        """Yield the chunks."""
        text = TextLines(self.path)
        all_lines, number = iter(text), 0
        while batch := list(islice(all_lines, CHUNK_ROWS)):
            chunk = Chunk()
            for number, line in enumerate(batch, number + 1):  # noqa: B020
                pairs = [pair.split("=") for pair in line.strip().split(";")]
                if all(len(pair) == 2 for pair in pairs):
                    chunk.add(number, dict(pairs))
                else:
                    chunk.add(number, None, "not key=value;key=value")
            chunk.end = text.offset(number)
            yield chunk
