"""A JSON file that is one object: rows under a key, lists or objects a column, or SQuAD's articles.

What it is taken for is said; what is none of these is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftlevel.data.sources.readers.json_lines import DECODER
from ftlevel.data.sources.table import BadRow, Row

_IN_A_ROW = {"messages", "conversations", "tools", "entities", "spans", "tokens", "words", "turns"}
"""Columns that hold lists, so that an object with one may be a row."""


@dataclass(frozen=True)
class OneObject:
    """What the one object of a file is.

    Attributes:
        rows: those that it gives; None where they are the elements of a list in the text.
        list_at: where that list begins.
        bad: places that gave no row.
        note: what it was taken for; "" where it is nothing that gives rows.
        hint: what to do then.
    """

    rows: list[Row] | None = None
    list_at: int = 0
    bad: tuple[BadRow, ...] = ()
    note: str = ""
    hint: str = ""
    keys: tuple[str, ...] = ()


def open_object(text: str) -> OneObject | None:
    """Return what a text is that begins with an object; None where it is to be read by lines."""
    begin = len(text) - len(text.lstrip())
    try:
        value, end = DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None  # several objects, or a broken one: the line reader says which
    if text[end:].strip():
        return None
    one_line = "\n" not in text.strip()
    if found := _articles(value) or _by_column(value, one_line=one_line):
        return found
    lists = [key for key, each in value.items() if _is_rows(each)]
    others = [each for key, each in value.items() if key not in lists]
    if len(lists) == 1 and lists[0] not in _IN_A_ROW and not any(map(_is_rows, others)):
        at = re.search(rf'"{re.escape(lists[0])}"\s*:\s*(?=\[)', text)
        if at is not None and DECODER.raw_decode(text, at.end())[0] == value[lists[0]]:
            return OneObject(list_at=at.end(), note=f"the rows are the list under {lists[0]!r}")
    if one_line:
        return None
    inner = [key for key, each in value.items() if isinstance(each, list)]
    hint = f"Save the list in {inner[0]!r} as the file" if inner else "Write [ … ] around it"
    return OneObject(hint=hint, keys=tuple(value))


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and type(value[0]) is dict


def _by_column(value: Mapping[str, Any], *, one_line: bool) -> OneObject | None:
    """Return the rows of columns, as pandas writes them: lists, objects by index, or split."""
    note = "a column a key, as pandas writes them; a row is what has one place in all"
    columns = list(value.values())
    if {"columns", "data"} <= value.keys() and isinstance(value["data"], list):
        names = value["columns"]
        if isinstance(names, list) and all(
            isinstance(row, list) and len(row) == len(names) for row in value["data"]
        ):
            rows = [dict(zip(names, row, strict=True)) for row in value["data"]]
            return OneObject(rows, note="columns and data, as pandas writes them")
    if all(type(column) is dict for column in columns):
        indices = list(columns[0]) if columns else []
        counted = bool(indices) and all(map(str.isdecimal, indices))
        if counted and all(list(column) == indices for column in columns):
            rows = [{key: value[key][index] for key in value} for index in indices]
            return OneObject(rows, note=note)
    if len(columns) > 1 and all(type(column) is list for column in columns):
        counts = {len(column) for column in columns}
        may_be_a_row = one_line and bool(_IN_A_ROW & value.keys())
        if len(counts) == 1 and counts != {0} and not may_be_a_row:
            cells = zip(*columns, strict=True)
            return OneObject([dict(zip(value, row, strict=True)) for row in cells], note=note)
    return None


def _articles(value: Mapping[str, Any]) -> OneObject | None:
    """Return the questions of SQuAD's files, a row each."""
    data = value.get("data")
    if not _is_rows(data) or not all(
        type(article) is dict and type(article.get("paragraphs")) is list for article in data or ()
    ):
        return None
    rows: list[Row] = []
    bad: list[BadRow] = []
    number = 0
    for article in data or ():
        for paragraph in article["paragraphs"]:
            for asked in paragraph.get("qas", ()) if isinstance(paragraph, dict) else ():
                number += 1
                try:
                    found = asked["answers"] if not asked.get("is_impossible") else []
                    answers = {
                        "text": [answer["text"] for answer in found],
                        "answer_start": [answer["answer_start"] for answer in found],
                    }
                    row = {"id": asked.get("id"), "title": article.get("title"),
                           "context": paragraph["context"], "question": asked["question"],
                           "answers": answers}  # fmt: skip
                except (KeyError, TypeError, AttributeError) as error:
                    bad.append(BadRow(number, f"question {number} lacks {error}"))
                else:
                    rows.append(row)
    return OneObject(rows, bad=tuple(bad), note="SQuAD's articles; a row is a question")
