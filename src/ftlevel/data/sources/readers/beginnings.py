"""What a file is by its beginning where its name does not say: stdin, CoNLL in .txt or .tsv."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection
from pathlib import Path

HEAD = 1 << 16
"""Bytes of a file that are looked at."""

_MARKS = ((b"PAR1", ".parquet"), (b"ARROW1", ".arrow"), (b"\xff" * 4, ".arrow"))
_ENTITY = re.compile(r"[BIESLU]-\S+")
_NAME = re.compile(r"[^\W\d][\w .()/-]{0,39}")


def head_lines(path: Path) -> list[str]:
    """Return the lines that a file begins with; the last is left out where it may be cut."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    text = io.StringIO(head.decode("utf-8", "replace").removeprefix("\ufeff"), newline=None)
    lines = text.read().split("\n")
    return lines[:-1] if len(head) == HEAD and len(lines) > 1 else lines


def tell_format(path: Path, columns: Collection[str]) -> tuple[str, str] | None:
    """Return the suffix for what is in a file, and by what it was told; None where it is open.

    Args:
        path: the file, which is not empty.
        columns: names by which the header of a table is known.
    """
    with path.open("rb") as file:
        start = file.read(8)
    for mark, suffix in _MARKS:
        if start.startswith(mark):
            return suffix, "by its first bytes"
    lines = head_lines(path)
    text = next((line.strip() for line in lines if line.strip()), "")
    if text[:1] == "{" and _is_whole(text):
        return ".jsonl", "its first line is an object"
    if text[:1] == "{":
        return ".json", "it begins with an object over several lines"
    if text[:1] == "[":
        return ".json", "it begins with a list"
    if looks_like_conll(lines):
        return ".conll", "its lines are words with tags"
    for separator, suffix in (("\t", ".tsv"), (",", ".csv")):
        if why := _table_sign(lines, separator, columns):
            return suffix, why
    return None


def _is_whole(line: str) -> bool:
    """Tell whether a line is JSON by itself, or so long that it was cut."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return len(line) > HEAD // 2
    return True


def _table_sign(lines: list[str], separator: str, columns: Collection[str]) -> str:
    """Return what speaks for a table with this separator; "" if nothing does."""
    rows = [row for row in csv.reader(lines, delimiter=separator) if row]
    header = rows[0] if rows else []
    if any(cell in columns or cell.lower() in columns for cell in header):
        return "its first line has names of columns"
    names = all(_NAME.fullmatch(cell) for cell in header)
    if len(header) > 1 and names and len(rows) > 1 and {len(row) for row in rows} == {len(header)}:
        return f"all of its first lines have {len(header)} cells"
    return ""


def looks_like_conll(lines: list[str]) -> bool:
    """Tell whether every line has a word and, in its last column, a tag such as O or B-LOC."""
    rows = [line.split() for line in lines if line.strip() and not line.startswith(("#", "-DOCS"))]
    tags = {row[-1] for row in rows}
    return (
        len({len(row) for row in rows}) == 1
        and len(rows[0]) > 1
        and any(_ENTITY.fullmatch(tag) for tag in tags)
        and all(tag == "O" or _ENTITY.fullmatch(tag) for tag in tags)
    )
