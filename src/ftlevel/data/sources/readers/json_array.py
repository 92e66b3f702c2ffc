"""JSON: an array of objects, or one object with them; else objects are taken as JSON Lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from ftlevel.data.sources.lines import as_row
from ftlevel.data.sources.readers.json_lines import (
    DECODER,
    complaint,
    fault_of,
    read_json_lines,
)
from ftlevel.data.sources.readers.json_object import OneObject, open_object
from ftlevel.data.sources.readers.text_lines import check_head, read_text
from ftlevel.data.sources.streams import Chunk, Cursor, Reader
from ftlevel.data.sources.table import BadRow, Row
from ftlevel.errors import InputError, listing

_SPACE = re.compile(r"[ \t\n\r]*")


class JsonArray(Reader):
    """One array over any number of lines, of which no part can be read without the rest."""

    in_parts = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        check_head(path)

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield one chunk; behind it there is nothing."""
        if cursor is not None:
            return
        source, text = str(self.path), read_text(self.path)
        start = text.lstrip()[:1]
        one = open_object(text) if start == "{" else None
        if start == "[":
            elements = read_json_array(text, source)
        elif one is None:
            elements = Elements(*read_json_lines(StringIO(text, newline="\n")))
        elif one.note:
            elements = self._read_object(text, one)
        else:
            raise InputError(
                f"{source}:1: one object (keys {listing([repr(key) for key in one.keys])}), "
                f"where an array of objects is expected. {one.hint}."
            )
        self.unit = "row" if elements.numbered else "line"
        yield self.chunk(
            elements.rows, elements.lines, elements.bad, {"at": self.path.stat().st_size}
        )

    def _read_object(self, text: str, one: OneObject) -> Elements:
        """Return the rows of a file that is one object."""
        note = f"{self.shown}: {one.note}"
        if note not in self.notes:
            self.notes.append(note)
        if one.rows is None:
            return read_json_array(text, str(self.path), one.list_at)
        taken = {row.line for row in one.bad}
        numbers = (n for n in range(1, len(one.rows) + len(taken) + 1) if n not in taken)
        return Elements(one.rows, list(numbers), list(one.bad), numbered=True)


@dataclass
class Elements:
    """Elements of an array.

    Attributes:
        rows: those that are objects.
        lines: for each the line that it begins on, or its number.
        bad: the others.
        numbered: whether `lines` and `bad` count elements: where several begin on one line.
    """

    rows: list[Row] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    numbered: bool = False


def read_json_array(text: str, source: str, begin: int = 0) -> Elements:
    """Read an array of objects, each with the line that it begins on, or its number.

    Args:
        text: the whole file.
        source: what errors call it.
        begin: where the array begins; if not with the file, more may come behind it.

    Raises:
        InputError: the array itself is broken; past that place no row can be trusted.
    """
    values: list[tuple[Any, str]] = []  # with what is wrong with it
    lines: list[int] = []
    line, counted = 1, 0
    at = _past_space(text, _past_space(text, begin) + 1)
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        value, end = _decode_element(text, at, line, source)
        value = as_row(value)
        values.append((value, fault_of(text[at:end], value)))
        lines.append(line)
        at = _past_space(text, end)
        mark = text[at : at + 1]
        if mark not in (",", "]") or not mark:
            here = line + text.count("\n", counted, at)
            _refuse_array(text, source, here, "not valid JSON (expecting ',' or ']')")
        more = mark == ","
        at = _past_space(text, at + 1) if more else at
    end = _past_space(text, at + 1)
    if end < len(text) and not begin:
        here = 1 + text.count("\n", 0, end)
        _refuse_array(text, source, here, "not valid JSON (more text after the end of the array)")
    numbered = len(set(lines)) < len(lines)
    found = Elements(numbered=numbered)
    for place, (value, fault) in zip(count(1) if numbered else lines, values, strict=False):
        if fault:
            found.bad.append(BadRow(place, fault))
        else:
            found.rows.append(value)
            found.lines.append(place)
    return found


def _past_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _decode_element(text: str, at: int, line: int, source: str) -> tuple[Any, int]:
    """Decode the value that begins at `at`, on `line`; return it and where it ends."""
    try:
        return DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        place = error.lineno if isinstance(error, json.JSONDecodeError) else line
        _refuse_array(text, source, place, complaint(error))


def _refuse_array(text: str, source: str, line: int, reason: str) -> NoReturn:
    cut = "" if text.rstrip().endswith(("]", "}")) else " (was the download or copy cut short?)"
    raise InputError(
        f"{source}:{line}: {reason}{cut}. Fix it, or write one object a line and name the file "
        ".jsonl, where --on-bad-row skip can drop a bad row."
    )
