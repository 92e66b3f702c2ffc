"""Readers of CoNLL files and plain text, UTF-8 lines with byte offsets, and format detection.

CoNLL has one word per line, with columns between tabs or spaces and a blank line between sentences.
The first column is the word, the last its tag. Plain text has one row per paragraph, in "text".
"""

from __future__ import annotations

import csv
import io
import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from shlex import quote

from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.streams import Chunk, Reader
from ftlevel.errors import InputError

_BLOCK = 1 << 13  # bytes decoded at once; invalid UTF-8 is reported before other errors in them
_BOM = b"\xef\xbb\xbf"


class TextLines:
    """Lines of a UTF-8 file from byte `at`, after the first `line` lines; skips a byte order mark.

    If `universal` is true, a carriage return alone ends a line, as in CSV.
    """

    def __init__(self, path: Path, at: int = 0, line: int = 0, *, universal: bool = False) -> None:
        self.path, self._universal = path, universal
        self._at, self._line = at, line  # byte and line before the block
        self._block: list[bytes] = []

    def offset(self, line: int) -> int:
        """Returns the byte after `line`, which must be in the current block."""
        return self._at + sum(map(len, self._block[: line - self._line]))

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[Iterator[str]]:
        with self.path.open("rb") as file:
            if not self._at and file.read(len(_BOM)) == _BOM:
                self._at = len(_BOM)
            file.seek(self._at)
            while block := file.readlines(_BLOCK):
                content = b"".join(block)
                _decode(self.path, content, self._at, self._line)
                if self._universal and b"\r" in content:
                    block = content.splitlines(keepends=True)
                self._block = block
                # Lazy decoding: lines that are not stored cause no memory fragmentation.
                yield map(bytes.decode, block)
                self._at += len(content)
                self._line += len(block)
                self._block = []


def load_text(path: Path) -> str:
    """Returns a file's text without a byte order mark; raises `InputError` if it is not UTF-8."""
    return _decode(path, path.read_bytes(), 0, 0).removeprefix("\ufeff")


def _decode(path: Path, content: bytes, at: int, line: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start) + 1
        byte = f"(byte 0x{content[error.start]:02x} at offset {at + error.start:,})"
        raise InputError(
            f"{path}:{line}: the file ends inside a character {byte}: "
            "was the download or copy cut short? Fetch it again."
            if error.reason == "unexpected end of data"
            else f"{path}:{line}: not UTF-8 {byte}. If it is Latin-1: "
            f"iconv -f LATIN1 -t UTF-8 {quote(path.name)} > {quote(f'utf8-{path.name}')}"
        ) from None


class TextReader(Reader):
    """Base class of readers of UTF-8 text; raises `InputError` if the file is none."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        _check_head(path)


def _check_head(path: Path) -> None:
    """Raise `InputError` for a file that starts like UTF-16, gzip or a Git LFS pointer."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _looks_like_utf16(head):
        raise InputError(
            f"{path}:1: looks like UTF-16, not UTF-8 (byte 0x{head[0]:02x} at offset 0). Convert "
            f"it: iconv -f UTF-16 -t UTF-8 {quote(path.name)} > {quote(f'utf8-{path.name}')}"
        )
    if head.startswith(b"\x1f\x8b"):
        raise InputError(f"{path}: is compressed by gzip. Name it {path.name}.gz.")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: is a Git LFS pointer, not the data. Fetch the data: git lfs pull"
        )


def _looks_like_utf16(head: bytes) -> bool:
    """Returns whether every other byte is mostly zero, as in Latin UTF-16 without a mark."""
    return len(head) > 3 and max(head[::2].count(0), head[1::2].count(0)) > 0.4 * len(head)


HEAD = 1 << 16
"""Number of bytes read to detect a format."""

_MAGIC = ((b"PAR1", ".parquet"), (b"ARROW1", ".arrow"), (b"\xff" * 4, ".arrow"))
_ENTITY = re.compile(r"[BIESLU]-\S+")
_NAME = re.compile(r"[^\W\d][\w .()/-]{0,39}")


def head_lines(path: Path) -> list[str]:
    """Returns the first lines of a file, without the last if it may be incomplete."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    text = io.StringIO(head.decode("utf-8", "replace").removeprefix("\ufeff"), newline=None)
    lines = text.read().split("\n")
    return lines[:-1] if len(head) == HEAD and len(lines) > 1 else lines


def detect_file_format(path: Path, column_names: Collection[str]) -> tuple[str, str] | None:
    """Returns the suffix of the format that the content suggests, and why; None if unclear.

    `column_names` are names that identify the header of a table. The file must not be empty.
    """
    with path.open("rb") as file:
        start = file.read(8)
    for magic, suffix in _MAGIC:
        if start.startswith(magic):
            return suffix, "by its first bytes"
    lines = head_lines(path)
    text = next((line.strip() for line in lines if line.strip()), "")
    if text[:1] == "{":
        if _is_complete(text):
            return ".jsonl", "its first line is an object"
        return ".json", "it begins with an object over several lines"
    if text[:1] == "[":
        return ".json", "it begins with a list"
    if looks_like_conll(lines):
        return ".conll", "its lines are words with tags"
    for delimiter, suffix in (("\t", ".tsv"), (",", ".csv")):
        if reason := _get_table_evidence(lines, delimiter, column_names):
            return suffix, reason
    return None


def _is_complete(text: str) -> bool:
    """Returns whether a line is valid JSON, or so long that it may have been cut off."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return len(text) > HEAD // 2
    return True


def _get_table_evidence(lines: list[str], delimiter: str, column_names: Collection[str]) -> str:
    """Returns why the lines look like a table with this delimiter; "" if they do not."""
    rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    names = rows[0] if rows else []
    if any(cell in column_names or cell.lower() in column_names for cell in names):
        return "its first line has names of columns"
    is_regular = len(rows) > 1 and {len(row) for row in rows} == {len(names)}
    if len(names) > 1 and is_regular and all(map(_NAME.fullmatch, names)):
        return f"all of its first lines have {len(names)} cells"
    return ""


def looks_like_conll(lines: list[str]) -> bool:
    """Returns whether every line has a word and, in the last column, a tag such as O or B-LOC."""
    rows = [line.split() for line in lines if line.strip() and not line.startswith(("#", "-DOCS"))]
    tags = {row[-1] for row in rows}
    return (
        len({len(row) for row in rows}) == 1
        and len(rows[0]) > 1
        and any(_ENTITY.fullmatch(tag) for tag in tags)
        and all(tag == "O" or _ENTITY.fullmatch(tag) for tag in tags)
    )


_TAG = re.compile(r"O|[BIESLU]-\S+")


class _BlockReader(TextReader):
    """Base of the readers of text with one row per block of lines, between blank lines."""

    uniform = True

    @abstractmethod
    def parse(self, first: int, lines: list[str], chunk: Chunk) -> None:
        """Add the row of a block of `lines`, the first of which is line `first`, to `chunk`."""

    def read(self) -> Iterator[Chunk]:
        text = TextLines(self.path)
        block, chunk, number = list[str](), Chunk(), 0
        for number, line in enumerate(text, 1):
            if not line.isspace():
                block.append(line)
                continue
            if block:
                self.parse(number - len(block), block, chunk)
                block = []
            if len(chunk.rows) + len(chunk.errors) >= CHUNK_ROWS:
                chunk.end = text.offset(number)
                yield chunk
                chunk = Chunk()
        if block:
            self.parse(number + 1 - len(block), block, chunk)
        if chunk.rows or chunk.errors:
            chunk.end = text.offset(number)
            yield chunk


class ConllReader(_BlockReader):
    """Reader of CoNLL files; a row is `{"tokens": […], "2": […], …, "tags": […]}`.

    Tags keep the file's scheme. `-DOCSTART-` lines, and comments (`# …`), are skipped.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        skipped = ("#", "-DOCSTART-")
        lines = [line for line in head_lines(path) if line.strip() and not line.startswith(skipped)]
        self._tabs = bool(lines) and all("\t" in line for line in lines)
        widths = Counter(len(self._cells(line)) for line in lines)
        self._width = widths.most_common(1)[0][0] if widths else 0
        if self._width < 1:
            raise InputError(f"{path}: has 0 sentences. Give a file with words, one a line.")
        self._names = ["tokens", *map(str, range(2, self._width)), "tags"][: self._width]

    def parse(self, first: int, lines: list[str], chunk: Chunk) -> None:
        start, words = first, list[list[str]]()
        for number, line in enumerate(lines, first):
            cells = self._cells(line)
            if cells[0] == "-DOCSTART-" or self._is_comment(cells, not words):
                continue
            if fault := self._get_error(cells):
                chunk.add(number, None, fault)
                return
            start = start if words else number
            words.append(cells)
        if words:
            fields = (list(column) for column in zip(*words, strict=True))
            chunk.add(start, dict(zip(self._names, fields, strict=True)))

    def _cells(self, text: str) -> list[str]:
        return [cell.strip() for cell in text.split("\t")] if self._tabs else text.split()

    def _is_comment(self, cells: list[str], at_start: bool) -> bool:
        """Returns whether a line is a comment rather than the word `#` with a tag."""
        if not cells[0].startswith("#"):
            return False
        is_row = len(cells) == self._width
        return not is_row or (at_start and self._width > 1 and not _TAG.fullmatch(cells[-1]))

    def _get_error(self, cells: list[str]) -> str:
        if len(cells) != self._width:
            count = f"{len(cells)} column{'s' * (len(cells) != 1)}"
            return f"has {count}, where most lines have {self._width}"
        return "" if all(cells) else f"column {cells.index('') + 1} is empty"


class ParagraphReader(_BlockReader):
    """Reader of plain text; line breaks within a paragraph are kept."""

    def parse(self, first: int, lines: list[str], chunk: Chunk) -> None:
        chunk.add(first, {"text": "\n".join(line.rstrip("\r\n") for line in lines)})
