"""Plain text: a row a paragraph, a run of lines without a blank one between them, as "text"."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.readers.text_lines import TextLines, check_head
from ftlevel.data.sources.streams import Chunk, Cursor, Reader
from ftlevel.data.sources.table import Row


class Paragraphs(Reader):
    """Plain text; the line breaks inside a paragraph are kept."""

    uniform = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        check_head(path)

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        at = cursor or {"at": 0, "line": 0}
        text = TextLines(self.path, **at)
        rows: list[Row] = []
        lines: list[int] = []
        run: list[str] = []
        number = before = int(at["line"])

        def end_run(after: int) -> None:
            if run:
                rows.append({"text": "\n".join(run)})
                lines.append(after - len(run))
                run.clear()

        for number, line in enumerate(text, before + 1):
            if not line.isspace():
                run.append(line.rstrip("\r\n"))
                continue
            end_run(number)
            if len(rows) >= PART:
                yield self.chunk(rows, lines, [], text.cursor(number))
                rows, lines = [], []
        end_run(number + 1)
        if rows:
            yield self.chunk(rows, lines, [], text.cursor(number))
