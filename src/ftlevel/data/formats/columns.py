"""Resolve column names given by users, and suggest columns for error messages.

A column may be given by name, number, nested key or several names joined by a plus. Suggestions use
column names and the first rows: the text is the column with the most words, the label the one with
the fewest values, and ids are excluded.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftlevel.data.sources.readers.refused import media_of_name
from ftlevel.data.sources.table import Row
from ftlevel.errors import is_long

JOINER = "\n\n"
"""Separator between the texts of joined columns: a blank line."""

NON_TEXT_ROLES = frozenset(
    {"label", "tags", "spans", "answers", "messages", "conversations", "tokens", "tools", "id"}
)
"""Roles whose value is not text, so that columns cannot be joined."""

JSON_ROLES = (NON_TEXT_ROLES | {"ranked"}) - {"label", "id"}
"""Roles whose value is a list or an object; a string value is parsed as JSON."""


def resolve_column(wish: str, columns: Sequence[str]) -> str | None:
    """Return the column that `wish` refers to, or None.

    An existing name takes precedence. Otherwise `answers.text` is a nested key, `2` the second
    column, `Title+Body` two joined columns, and case is ignored.
    """
    if wish in columns or wish.partition(".")[0] in columns:
        return wish
    if wish.isdecimal() and 0 < int(wish) <= len(columns):
        return columns[int(wish) - 1]
    if "+" in wish:
        parts = [resolve_column(part.strip(), columns) for part in wish.split("+")]
        return "+".join(part for part in parts if part) if all(parts) else None
    return next((column for column in columns if column.lower() == wish.lower()), None)


def column_for_flag(column: str, columns: Sequence[str]) -> str:
    """Return a column as written in a flag: its name, or its number if the name is long."""
    is_known = column in columns and is_long(column)
    return str(columns.index(column) + 1) if is_known else column


def source_columns(column: str, columns: Sequence[str]) -> list[str]:
    """Return the columns read for `column`, an expression returned by `resolve_column`."""
    if column in columns:
        return [column]
    parts = column.split("+") if "+" in column else [column]
    return [part if part in columns else part.partition(".")[0] for part in parts]


def columns_exist(column: str, columns: Sequence[str]) -> bool:
    """Return whether all columns that `column` refers to exist."""
    return all(part in columns for part in source_columns(column, columns))


_ID = re.compile(
    r"(.*[\s_.-])?(id|ids|idx|index|uuid|guid|key|nr|no|number|url|link|date|time|timestamp)|.*[a-z]I[dD]",
    re.IGNORECASE,
)
_FILE = re.compile(r"file(_?name|_?path)?s?", re.I)


def is_id(column: str) -> bool:
    """Return whether a column's name suggests ids, dates or links."""
    return _ID.fullmatch(column.strip()) is not None


def is_media_column(column: str) -> bool:
    """Return whether a column's name suggests images, audio, video or file names."""
    return media_of_name(column) is not None or _FILE.fullmatch(column) is not None


def rank_columns(columns: Sequence[str], role: str, rows: Sequence[Row]) -> list[str]:
    """Return the `columns` whose values are possible for `role`, the most likely first."""
    able = [c for c in columns if not is_id(c) and not is_media_column(c)]
    if not rows:
        return able
    values = {c: [row[c] for row in rows if row.get(c) is not None] for c in able}
    able = [c for c in able if values[c] and all(map(_holder(role), values[c]))]
    if role == "label":
        kinds = {c: len({str(value) for value in values[c]}) for c in able}
        return sorted(able, key=lambda c: (kinds[c] < 2, kinds[c]))
    if role in NON_TEXT_ROLES:
        return able
    words = {c: sum(len(value.split()) for value in values[c]) / len(values[c]) for c in able}
    texts = [c for c in able if words[c] > 1.5] or able
    return sorted(texts, key=lambda c: -words[c])


def _holder(role: str) -> Callable[[Any], bool]:
    """Return a predicate that is true for possible values of `role`."""
    if role in ("messages", "conversations", "spans"):
        return lambda value: isinstance(value, list) and (not value or isinstance(value[0], dict))
    if role in ("tokens", "tags", "tools"):
        return lambda value: isinstance(value, list)
    if role == "answers":
        return lambda value: isinstance(value, dict)
    if role == "label":
        return lambda value: not isinstance(value, dict)
    return lambda value: isinstance(value, str)


def format_map_flags(pairs: Mapping[str, str]) -> str:
    """Return `--map` flags for the shell, quoted where necessary."""
    return " ".join(f"--map {shlex.quote(f'{role}={column}')}" for role, column in pairs.items())


def chosen_roles(names: Mapping[str, str], value: object) -> dict[str, str]:
    """Return the column of each role for training on the chosen answers of a preference dataset."""
    if isinstance(value, list):
        users = any(isinstance(t, dict) and t.get("role") == "user" for t in value)
        if users or "prompt" not in names:
            return {"messages": names["chosen"]}
    if "prompt" in names:
        return {"prompt": names["prompt"], "completion": names["chosen"]}
    return {"text": names["chosen"]}
