"""Readers of JSON Lines and JSON files, stricter than common loaders.

A row must be one object without duplicate keys, NaN or lone surrogates. Bad rows are collected with
their lines instead of raising. A JSON file holds an array of objects, one object that contains the
rows (under a key, by column, or as in SQuAD), or several objects, which are read as JSON Lines.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from itertools import count, islice
from pathlib import Path
from typing import Any, NoReturn

from ftlevel.data.sources import lines
from ftlevel.data.sources.lines import CHUNK_ROWS, LineNumbers, LineRows, as_row
from ftlevel.data.sources.readers.text import TextLines, TextReader, load_text
from ftlevel.data.sources.streams import Chunk
from ftlevel.data.sources.table import (
    BadRow,
    Row,
    RowShapeCounter,
    Table,
    is_encodable,
    json_type_name,
)
from ftlevel.errors import InputError, join_names

# An escaped high surrogate not followed by a low one, or a low one not preceded by a high one.
_LONE_ESCAPE = re.compile(
    r"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|[c-fC-F]..(?<!\\u[dD][89abAB]..\\u[dD][c-fC-F]..))"
)
_CUT = " (the last line, without a newline: was the download or copy cut short?)"


class JsonLinesReader(TextReader):
    """Reader of JSON Lines; tables of large files keep byte offsets and decode rows on access."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        text = TextLines(path)
        first = next(iter(text), "")
        self._begin = text.offset(0)
        if first.strip() == "[" or first.lstrip().startswith("[{"):
            raise InputError(
                f"{path}:1: looks like one JSON array, where one object a line is expected. "
                f"Rename it to {path.with_suffix('.json').name}"
            )

    def read(self) -> Iterator[Chunk]:
        text = TextLines(self.path)
        remaining, before = iter(text), 0
        while block := list(islice(remaining, CHUNK_ROWS)):
            chunk = load_json_lines(block, before)
            before += len(block)
            chunk.end = text.offset(before)
            yield chunk

    def collect(self) -> tuple[Table, list[BadRow]]:
        """Returns all rows as a table (of `LineRows` if the file is large), and the `BadRow`s."""
        if self.path.stat().st_size < lines.LARGE_BYTES:
            return super().collect()
        numbers, offsets, shapes = LineNumbers(), array("q", [self._begin]), RowShapeCounter()
        errors: list[BadRow] = []
        for chunk in self.chunks():
            offsets.append(chunk.end or 0)
            errors += chunk.errors
            for row, line in zip(chunk.rows, chunk.lines, strict=True):
                shapes.add(row)
                numbers.append(line)
        rows = LineRows(self.path, numbers, offsets)
        return self.table(rows, numbers), [*errors, *shapes.get_inconsistent(rows, numbers)]


class _NotStrict(ValueError):
    """Error: the text is valid for Python's `json`, but not for ftlevel."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for index, name in enumerate(names) if name in names[:index])
        raise _NotStrict(f"the key {repeated!r} occurs twice in one object")
    return row


def _constant(name: str) -> NoReturn:
    raise _NotStrict(f"not valid JSON ({name} is not a JSON number; write null)")


# object_pairs_hook detects duplicate keys in the C scanner; it costs 15 % of the decoding time.
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _describe_error(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno})"
    if isinstance(error, RecursionError):
        return "not usable JSON (nested too deeply)"
    return str(error) if isinstance(error, _NotStrict) else f"not usable JSON ({error})"


def _may_be_cut(text: str) -> bool:
    """Returns whether the JSON `text` may have a lone surrogate, which tokenizers cannot encode."""
    if "\\ud" not in text and "\\uD" not in text:
        return False
    # Fast path: escaped emoji are common, and the search takes a quarter of the time of encoding.
    return "\\\\" in text or _LONE_ESCAPE.search(text) is not None


def _get_error(value: object, *, may_be_cut: bool) -> str:
    """Returns what is wrong with a decoded row, or ""."""
    if type(value) is not dict:
        return f"{json_type_name(value)}, where one object with named columns is expected"
    if not value:
        return "an object without keys"
    if may_be_cut and not is_encodable(json.dumps(value, ensure_ascii=False)):
        return (
            "half of a surrogate pair (a '\\ud…' escape without its partner, as of an emoji cut in "
            "two)"
        )
    return ""


def load_json_lines(text: Iterable[str], before: int = 0) -> Chunk:
    """Load the rows of JSON Lines; blank lines are skipped.

    `text` must be split at line feeds only. `before` is the number of lines that precede it.
    """
    chunk = Chunk()
    for number, line in enumerate(text, before + 1):
        if line.isspace():
            continue
        row = None
        try:
            row = as_row(DECODER.decode(line))
            fault = _get_error(row, may_be_cut=_may_be_cut(line))
        except (ValueError, RecursionError) as error:
            fault = _describe_error(error) + ("" if line.endswith("\n") else _CUT)
        chunk.add(number, row, fault)
    return chunk


_LIST_COLUMNS = {
    "messages",
    "conversations",
    "tools",
    "entities",
    "spans",
    "tokens",
    "words",
    "turns",
}
"""Columns that hold lists: an object with one of them may be a row."""


@dataclass(frozen=True)
class OneObject:
    """Rows of a JSON file that is a single object, or their position in its text.

    If `rows` is None, they are the list at character `list_at`. `note` says where the rows were
    found; it is "" if there are none, and then `hint` tells how to fix the file.
    """

    rows: list[Row] | None = None
    list_at: int = 0
    errors: tuple[BadRow, ...] = ()
    note: str = ""
    hint: str = ""
    keys: tuple[str, ...] = ()


def open_object(text: str) -> OneObject | None:
    """Parse a text that starts with an object as one object with rows; None if it is JSON Lines."""
    start = len(text) - len(text.lstrip())
    try:
        value, end = DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None  # several objects or invalid JSON: the JSON Lines reader reports errors by line
    if text[end:].strip():
        return None
    is_json_lines = "\n" not in text.strip()
    if rows := _parse_squad(value) or _parse_pandas(value, is_json_lines=is_json_lines):
        return rows
    lists = [key for key, each in value.items() if _is_rows(each)]
    others = [each for key, each in value.items() if key not in lists]
    if len(lists) == 1 and lists[0] not in _LIST_COLUMNS and not any(map(_is_rows, others)):
        at = re.search(rf'"{re.escape(lists[0])}"\s*:\s*(?=\[)', text)
        if at is not None and DECODER.raw_decode(text, at.end())[0] == value[lists[0]]:
            return OneObject(list_at=at.end(), note=f"the rows are the list under {lists[0]!r}")
    if is_json_lines:
        return None
    inner = [key for key, each in value.items() if isinstance(each, list)]
    hint = f"Save the list in {inner[0]!r} as the file" if inner else "Write [ … ] around it"
    return OneObject(hint=hint, keys=tuple(value))


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and type(value[0]) is dict


def _parse_pandas(value: Mapping[str, Any], *, is_json_lines: bool) -> OneObject | None:
    """Returns the rows of an object of columns, as pandas writes it; None for other objects."""
    note = "one column per key, as pandas writes them; a row has the same index in all"
    series = list(value.values())
    if {"columns", "data"} <= value.keys() and isinstance(value["data"], list):
        names = value["columns"]
        if isinstance(names, list) and all(
            isinstance(row, list) and len(row) == len(names) for row in value["data"]
        ):
            names = list(map(str, names))
            if len(set(names)) < len(names):
                return OneObject(hint="Give each of its columns another name", keys=tuple(value))
            rows = [dict(zip(names, row, strict=True)) for row in value["data"]]
            return OneObject(rows, note="columns and data, as pandas writes them")
    if all(type(column) is dict for column in series):
        indices = list(series[0]) if series else []
        counted = bool(indices) and all(map(str.isdecimal, indices))
        if counted and all(list(column) == indices for column in series):
            rows = [{key: value[key][index] for key in value} for index in indices]
            return OneObject(rows, note=note)
    if len(series) > 1 and all(type(column) is list for column in series):
        counts = {len(column) for column in series}
        may_be_a_row = is_json_lines and bool(_LIST_COLUMNS & value.keys())
        if len(counts) == 1 and counts != {0} and not may_be_a_row:
            cells = zip(*series, strict=True)
            return OneObject([dict(zip(value, row, strict=True)) for row in cells], note=note)
    return None


def _parse_squad(value: Mapping[str, Any]) -> OneObject | None:
    articles: Any = value.get("data")
    if not _is_rows(articles) or not all(
        type(article) is dict and type(article.get("paragraphs")) is list for article in articles
    ):
        return None
    questions = (
        (article, paragraph, question)
        for article in articles
        for paragraph in article["paragraphs"]
        for question in (paragraph.get("qas", ()) if isinstance(paragraph, dict) else ())
    )
    rows: list[Row] = []
    errors: list[BadRow] = []
    for number, (article, paragraph, question) in enumerate(questions, 1):
        try:
            answers = [] if question.get("is_impossible") else question["answers"]
            row = {
                "id": question.get("id"),
                "title": article.get("title"),
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {
                    key: [answer[key] for answer in answers] for key in ("text", "answer_start")
                },
            }
        except (KeyError, TypeError, AttributeError) as error:
            errors.append(BadRow(number, f"question {number} lacks {error}"))
        else:
            rows.append(row)
    return OneObject(rows, errors=tuple(errors), note="SQuAD's articles; a row is a question")


_SPACE = re.compile(r"[ \t\n\r]*")


class JsonReader(TextReader):
    """Reader of JSON files, each of which is read as a whole."""

    def read(self) -> Iterator[Chunk]:
        source, text = str(self.path), load_text(self.path)
        start, is_numbered = text.lstrip()[:1], False
        one = open_object(text) if start == "{" else None
        if start == "[":
            chunk, is_numbered = load_json_array(text, source)
        elif one is None:
            chunk = load_json_lines(StringIO(text, newline="\n"))
        elif one.note:
            chunk, is_numbered = self._read_object(text, one)
        else:
            raise InputError(
                f"{source}:1: one object (keys {join_names([repr(key) for key in one.keys])}), "
                f"where an array of objects is expected. {one.hint}."
            )
        self.unit = "row" if is_numbered else "line"
        chunk.end = self.path.stat().st_size
        yield chunk

    def _read_object(self, text: str, one: OneObject) -> tuple[Chunk, bool]:
        note = f"{self.shown}: {one.note}"
        if note not in self.notes:
            self.notes.append(note)
        if one.rows is None:
            return load_json_array(text, str(self.path), one.list_at)
        errors = {row.line for row in one.errors}
        numbers = (number for number in count(1) if number not in errors)
        chunk, may_be_cut = Chunk(errors=list(one.errors)), _may_be_cut(text)
        for number, row in zip(numbers, one.rows, strict=False):
            chunk.add(number, row, _get_error(row, may_be_cut=may_be_cut))
        return chunk, True


def load_json_array(text: str, source: str, start: int = 0) -> tuple[Chunk, bool]:
    """Load the elements of the array of objects at `start` of `text`.

    The result is true if they are numbered, as several are in one line. If `start` is 0, only white
    space may follow. Raises `InputError` for a malformed array.
    """
    values: list[tuple[Any, str]] = []  # (value, fault or "")
    lines: list[int] = []
    line, counted = 1, 0
    at = _past_space(text, _past_space(text, start) + 1)
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        value, end = _decode_element(text, at, line, source)
        value = as_row(value)
        values.append((value, _get_error(value, may_be_cut=_may_be_cut(text[at:end]))))
        lines.append(line)
        at = _past_space(text, end)
        delimiter = text[at : at + 1]
        if delimiter not in (",", "]"):
            end_position = line + text.count("\n", counted, at)
            _refuse_array(text, source, end_position, "not valid JSON (expecting ',' or ']')")
        more = delimiter == ","
        at = _past_space(text, at + 1) if more else at
    end = _past_space(text, at + 1)
    if end < len(text) and not start:
        end_position = 1 + text.count("\n", 0, end)
        _refuse_array(
            text, source, end_position, "not valid JSON (more text after the end of the array)"
        )
    chunk, is_numbered = Chunk(), len(set(lines)) < len(lines)
    for number, line, (value, fault) in zip(count(1), lines, values, strict=False):
        chunk.add(number if is_numbered else line, value, fault)
    return chunk, is_numbered


def _past_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _decode_element(text: str, at: int, line: int, source: str) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else line
        _refuse_array(text, source, line, _describe_error(error))


def _refuse_array(text: str, source: str, line: int, error: str) -> NoReturn:
    cut = "" if text.rstrip().endswith(("]", "}")) else " (was the download or copy cut short?)"
    raise InputError(
        f"{source}:{line}: {error}{cut}. Fix it, or write one object a line and name the file "
        ".jsonl, where --on-bad-row skip can drop a bad row."
    )
