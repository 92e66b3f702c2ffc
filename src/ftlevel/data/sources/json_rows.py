"""Rows from JSON Lines, and from one JSON array; strict where the usual loaders guess.

Strict means: one object a row, no key twice, no NaN, no half of a surrogate pair. What is wrong is
collected with its line; nothing is raised for a single bad row.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ftlevel.data.sources.lines import LineNumbers, LineRows, read_lines
from ftlevel.data.sources.table import BadRow, Row
from ftlevel.data.sources.uniform import Shapes, kind_of
from ftlevel.errors import InputError

_SPACE = re.compile(r"[ \t\n\r]*")
# An escaped high surrogate without a low one behind it, or a low one without a high one before.
_LONE_ESCAPE = re.compile(
    r"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|[c-fC-F]..(?<!\\u[dD][89abAB]..\\u[dD][c-fC-F]..))"
)
_CUT = " (the last line, without a newline: was the download or copy cut short?)"


@dataclass
class Raw:
    """What a reader found: rows with their lines, and lines that gave no row."""

    rows: Sequence[Row] = field(default_factory=list)
    lines: list[int] | LineNumbers = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)

    def add(self, row: Row, line: int) -> None:
        """Keep `row`, which begins on `line`."""
        if isinstance(self.rows, list):
            self.rows.append(row)
        self.lines.append(line)


class RawLines(Raw):
    """What the reader of a large file found: rows that are decoded when they are asked for.

    Attributes:
        shapes: of the rows, counted as they were read.
    """

    def __init__(self) -> None:
        super().__init__((), LineNumbers())
        self.shapes = Shapes()

    @classmethod
    def read(cls, path: Path) -> RawLines:
        """Read the whole of a file once.

        Raises:
            UnicodeDecodeError: a line is not UTF-8.
        """
        raw, places = cls(), array("q")
        read_json_lines(read_lines(path, places), raw)
        raw.rows = LineRows(path, raw.lines, places)
        return raw

    def add(self, row: Row, line: int) -> None:
        """Count `row`, and keep its line."""
        self.lines.append(line)
        self.shapes.add(row)


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
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _complaint(error: ValueError | RecursionError) -> str:
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


def _fault(text: str, value: object) -> str:
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


def read_json_lines(stream: Iterable[str], raw: Raw | None = None) -> Raw:
    """Read one object a line; blank lines are passed over.

    Args:
        stream: lines split at line feeds only, for a string may hold other line separators.
        raw: what is added to (mutated); a new one by default.
    """
    raw = Raw() if raw is None else raw
    decode, add, bad = _DECODER.decode, raw.add, raw.bad
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        try:
            row = decode(line)
        except (ValueError, RecursionError) as error:
            cut = "" if line.endswith("\n") else _CUT
            bad.append(BadRow(number, _complaint(error) + cut))
            continue
        if fault := _fault(line, row):
            bad.append(BadRow(number, fault))
        else:
            add(row, number)
    return raw


def read_json_array(text: str, source: str) -> Raw:
    """Read an array of objects, each with the line that it begins on.

    Raises:
        InputError: the array itself is broken; past that place no row can be trusted.
    """
    raw = Raw()
    line, counted = 1, 0
    at = _past_space(text, _past_space(text, 0) + 1)
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        value, end = _decode_element(text, at, line, source)
        if fault := _fault(text[at:end], value):
            raw.bad.append(BadRow(line, fault))
        else:
            raw.add(value, line)
        at = _past_space(text, end)
        mark = text[at : at + 1]
        if mark not in (",", "]") or not mark:
            here = line + text.count("\n", counted, at)
            _refuse_array(text, source, here, "not valid JSON (expecting ',' or ']')")
        more = mark == ","
        at = _past_space(text, at + 1) if more else at
    end = _past_space(text, at + 1)
    if end < len(text):
        here = 1 + text.count("\n", 0, end)
        _refuse_array(text, source, here, "not valid JSON (more text after the end of the array)")
    return raw


def _past_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _decode_element(text: str, at: int, line: int, source: str) -> tuple[Any, int]:
    """Decode the value that begins at `at`, on `line`; return it and where it ends."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        place = error.lineno if isinstance(error, json.JSONDecodeError) else line
        _refuse_array(text, source, place, _complaint(error))


def _refuse_array(text: str, source: str, line: int, reason: str) -> NoReturn:
    cut = "" if text.rstrip().endswith(("]", "}")) else " (was the download or copy cut short?)"
    raise InputError(
        f"{source}:{line}: {reason}{cut}. Fix it, or write one object a line and name the file "
        ".jsonl, where --on-bad-row skip can drop a bad row."
    )
