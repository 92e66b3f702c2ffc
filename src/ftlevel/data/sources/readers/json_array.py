"""JSON: an array of objects; a file that begins with an object is taken as JSON Lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from ftlevel.data.sources.readers.json_lines import (
    DECODER,
    Found,
    complaint,
    fault_of,
    read_json_lines,
)
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
        if start == "{":
            _check_not_one_object(text, source)
        if start == "[":
            found = read_json_array(text, source)
        else:
            found = read_json_lines(StringIO(text, newline="\n"))
        yield self.chunk(*found, {"at": self.path.stat().st_size})


def _check_not_one_object(text: str, source: str) -> None:
    """Raise if the file is one object over several lines: a wrapper, not rows."""
    try:
        whole = json.loads(text) if "\n" in text.strip() else None
    except (ValueError, RecursionError):
        return  # several objects, or a broken one: the line reader says which
    if isinstance(whole, dict):
        lists = [key for key, value in whole.items() if isinstance(value, list)]
        hint = f"Save the list in {lists[0]!r} as the file" if lists else "Write [ … ] around it"
        raise InputError(
            f"{source}:1: one object (keys {listing([repr(key) for key in whole])}), "
            f"where an array of objects is expected. {hint}."
        )


def read_json_array(text: str, source: str) -> Found:
    """Read an array of objects, each with the line that it begins on.

    Raises:
        InputError: the array itself is broken; past that place no row can be trusted.
    """
    rows: list[Row] = []
    lines: list[int] = []
    bad: list[BadRow] = []
    line, counted = 1, 0
    at = _past_space(text, _past_space(text, 0) + 1)
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        value, end = _decode_element(text, at, line, source)
        if fault := fault_of(text[at:end], value):
            bad.append(BadRow(line, fault))
        else:
            rows.append(value)
            lines.append(line)
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
    return rows, lines, bad


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
