"""CoNLL: a line a word, its columns between tabs or spaces, a blank line between sentences.

The first column is the word and the last one its tag; those between are named by their number.
Tags stay in the file's scheme. `-DOCSTART-` and comments (`# …`) between sentences are no words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.readers.beginnings import head_lines
from ftlevel.data.sources.readers.text_lines import TextLines, check_head
from ftlevel.data.sources.streams import Chunk, Cursor, Reader
from ftlevel.data.sources.table import BadRow, Row
from ftlevel.errors import InputError

_TAG = re.compile(r"O|[BIESLU]-\S+")


class Conll(Reader):
    """Sentences of words with tags; a row is `{"tokens": […], "2": […], …, "tags": […]}`."""

    uniform = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        check_head(path)
        skipped = ("#", "-DOCSTART-")
        lines = [each for each in head_lines(path) if each.strip() and not each.startswith(skipped)]
        self._tabs = bool(lines) and all("\t" in line for line in lines)
        widths = Counter(len(self._cells(line)) for line in lines)
        self._width = widths.most_common(1)[0][0] if widths else 0
        if self._width < 1:
            raise InputError(f"{path}: has 0 sentences. Give a file with words, one a line.")
        between = [str(number) for number in range(2, self._width)]
        self._names = ["tokens", *between, "tags"] if self._width > 1 else ["tokens"]

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        at = cursor or {"at": 0, "line": 0}
        text = TextLines(self.path, **at)
        rows: list[Row] = []
        lines: list[int] = []
        bad: list[BadRow] = []
        words: list[list[str]] = []
        fault: BadRow | None = None
        number = begin = int(at["line"])

        def end_sentence() -> None:
            nonlocal fault
            if fault is not None:
                bad.append(fault)
            elif words:
                columns = (list(column) for column in zip(*words, strict=True))
                rows.append(dict(zip(self._names, columns, strict=True)))
                lines.append(begin)
            words.clear()
            fault = None

        for number, line in enumerate(text, int(at["line"]) + 1):
            if line.isspace():
                end_sentence()
                if len(rows) + len(bad) >= PART:
                    yield self.chunk(rows, lines, bad, text.cursor(number))
                    rows, lines, bad = [], [], []
                continue
            cells = self._cells(line)
            if cells[0] == "-DOCSTART-" or self._is_comment(cells, not words):
                continue
            if not words and fault is None:
                begin = number
            if fault is None:
                fault = self._fault(cells, number)
            if fault is None:
                words.append(cells)
        end_sentence()
        if rows or bad:
            yield self.chunk(rows, lines, bad, text.cursor(number))

    def _cells(self, line: str) -> list[str]:
        return [cell.strip() for cell in line.split("\t")] if self._tabs else line.split()

    def _is_comment(self, cells: list[str], at_start: bool) -> bool:
        """Tell a comment from the word `#`, which has as many columns as others, and a tag."""
        if not cells[0].startswith("#"):
            return False
        is_row = len(cells) == self._width
        return not is_row or (at_start and self._width > 1 and not _TAG.fullmatch(cells[-1]))

    def _fault(self, cells: list[str], number: int) -> BadRow | None:
        if len(cells) != self._width:
            count = f"{len(cells)} column{'s' * (len(cells) != 1)}"
            return BadRow(number, f"has {count}, where most lines have {self._width}")
        if not all(cells):
            return BadRow(number, f"column {cells.index('') + 1} is empty")
        return None
