"""JSON Lines: one object a line, strict where the usual loaders guess.

Strict means: one object a row, no key twice, no NaN, no half of a surrogate pair. What is wrong is
collected with its line; nothing is raised for a single bad row.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ftlevel.data.sources import lines
from ftlevel.data.sources.lines import PART, LineNumbers, LineRows, as_row
from ftlevel.data.sources.readers.text_lines import TextLines, check_head
from ftlevel.data.sources.streams import Chunk, Cursor, Reader
from ftlevel.data.sources.table import BadRow, Row, Table
from ftlevel.data.sources.uniform import Shapes, kind_of
from ftlevel.errors import InputError

Found: TypeAlias = tuple[list[Row], list[int], list[BadRow]]  # rows, their lines, what is no row

# An escaped high surrogate without a low one behind it, or a low one without a high one before.
_LONE_ESCAPE = re.compile(
    r"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|[c-fC-F]..(?<!\\u[dD][89abAB]..\\u[dD][c-fC-F]..))"
)
_CUT = " (the last line, without a newline: was the download or copy cut short?)"


class JsonLines(Reader):
    """JSON Lines; of a large file a table holds where lines begin, and reads them when asked."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        check_head(path)
        text = TextLines(path)
        first = next(iter(text), "")
        self._begin = text.cursor(0)
        if first.strip() == "[" or first.lstrip().startswith("[{"):
            raise InputError(
                f"{path}:1: looks like one JSON array, where one object a line is expected. "
                f"Rename it to {path.with_suffix('.json').name}"
            )

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        at = cursor or self._begin
        text = TextLines(self.path, **at)
        taken, before = iter(text), int(at["line"])
        while some := list(islice(taken, PART)):
            found = read_json_lines(some, before)
            before += len(some)
            yield self.chunk(*found, text.cursor(before))

    def collect(self) -> tuple[Table, list[BadRow]]:
        """Return the rows, of a large file by the cursors of its chunks; and the bad ones."""
        if self.path.stat().st_size < lines.LARGE_BYTES:
            return super().collect()
        numbers, places, shapes = LineNumbers(), array("q", [self._begin["at"]]), Shapes()
        bad: list[BadRow] = []
        for chunk in self.chunks():
            places.append(chunk.cursor["at"])
            bad += chunk.bad
            for row, line in zip(chunk.rows, chunk.lines, strict=True):
                shapes.add(row)
                numbers.append(line)
        rows = LineRows(self.path, numbers, places)
        return self.table(rows, numbers), [*bad, *shapes.find_odd(rows, numbers)]


class _NotStrict(ValueError):
    """The text is JSON to Python, but not the JSON that we accept."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise _NotStrict(f"the key {twice!r} stands twice in one object")
    return row


def _constant(name: str) -> NoReturn:
    raise _NotStrict(f"not valid JSON ({name} is no JSON number; write null)")


# With the pairs hook the C scanner calls `_object` once an object: 15 % on top of the plain
# decoder, much less than a second look at the keys would cost.
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def complaint(error: ValueError | RecursionError) -> str:
    """Return the reason for a text that did not decode."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno})"
    if isinstance(error, RecursionError):
        return "not usable JSON (nested too deeply)"
    return str(error) if isinstance(error, _NotStrict) else f"not usable JSON ({error})"


def _has_lone_surrogate(text: str, value: object) -> bool:
    """Tell whether `value`, decoded from `text`, holds half of a surrogate pair.

    Such a string cannot be encoded, so a tokenizer would fail on it, far from here.
    """
    if "\\ud" not in text and "\\uD" not in text:
        return False
    # Emoji written as two escapes are common, and this search takes a quarter of an encoding.
    if "\\\\" not in text and not _LONE_ESCAPE.search(text):
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def fault_of(text: str, value: object) -> str:
    """Return what is wrong with a decoded row, or an empty string."""
    if type(value) is not dict:
        return f"{kind_of(value)}, where one object with named columns is expected"
    if not value:
        return "an object without keys"
    if _has_lone_surrogate(text, value):
        return (
            "half of a surrogate pair "
            "(a '\\ud…' escape without its partner, as of an emoji cut in two)"
        )
    return ""


def read_json_lines(some: Iterable[str], before: int = 0) -> Found:
    """Read one object a line; blank lines are passed over.

    Args:
        some: lines split at line feeds only, for a string may hold other line separators.
        before: how many lines lie before them.
    """
    rows: list[Row] = []
    lines: list[int] = []
    bad: list[BadRow] = []
    decode = DECODER.decode
    for number, line in enumerate(some, before + 1):
        if line.isspace():
            continue
        try:
            row = as_row(decode(line))
        except (ValueError, RecursionError) as error:
            cut = "" if line.endswith("\n") else _CUT
            bad.append(BadRow(number, complaint(error) + cut))
            continue
        if fault := fault_of(line, row):
            bad.append(BadRow(number, fault))
        else:
            rows.append(row)
            lines.append(number)
    return rows, lines, bad
