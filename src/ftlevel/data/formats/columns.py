"""Which columns may be meant where nobody says: for the flags that an error proposes.

By their names, and by what the first rows hold: an id is never proposed, a text is the column with
the most words, a label the one with the fewest values.

A column as the user names it: by its name, its number, a key inside of it, or several joined.
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
"""What stands between the texts of joined columns: a blank line."""

WHOLE = frozenset(
    {"label", "tags", "spans", "answers", "messages", "conversations", "tokens", "tools", "id"}
)
"""Roles whose value is no text, so that no two columns can be joined to one."""

NESTED = (WHOLE | {"ranked"}) - {"label", "id"}
"""Roles whose value is a list or an object; a text there is the JSON of one."""


def resolve_column(wish: str, columns: Sequence[str]) -> str | None:
    """Return the column that is meant by `wish`; None if there is none.

    What has such a name goes first; then `answers.text` reaches into an object, `2` is the second
    column, `Title+Body` joins the texts of two, and upper and lower case are the same.
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
    """Return how a flag names a column: by its number where the name is long, as of no header."""
    is_known = column in columns and is_long(column)
    return str(columns.index(column) + 1) if is_known else column


def parts_of(column: str, columns: Sequence[str]) -> list[str]:
    """Return the columns that are read where `column` is, as `resolve_column` gave it."""
    if column in columns:
        return [column]
    parts = column.split("+") if "+" in column else [column]
    return [part if part in columns else part.partition(".")[0] for part in parts]


def is_there(column: str, columns: Sequence[str]) -> bool:
    """Tell whether all that `column` reads is there."""
    return all(part in columns for part in parts_of(column, columns))


_ID = re.compile(
    r"(.*[\s_.-])?(id|ids|idx|index|uuid|guid|key|nr|no|number|url|link|date|time|timestamp)|.*[a-z]I[dD]",
    re.IGNORECASE,
)
_FILE = re.compile(r"file(_?name|_?path)?s?", re.I)


def is_id(column: str) -> bool:
    """Tell whether a column's name says that it holds ids, dates or links."""
    return _ID.fullmatch(column.strip()) is not None


def names_media(column: str) -> bool:
    """Tell whether a column's name says that it holds images, audio or files."""
    return media_of_name(column) is not None or _FILE.fullmatch(column) is not None


def rank_columns(columns: Sequence[str], role: str, rows: Sequence[Row]) -> list[str]:
    """Return those of `columns` that may be what `role` wants, the likeliest first."""
    able = [c for c in columns if not is_id(c) and not names_media(c)]
    if not rows:
        return able
    values = {c: [row[c] for row in rows if row.get(c) is not None] for c in able}
    able = [c for c in able if values[c] and all(map(_holder(role), values[c]))]
    if role == "label":
        kinds = {c: len({str(value) for value in values[c]}) for c in able}
        return sorted(able, key=lambda c: (kinds[c] < 2, kinds[c]))
    if role in WHOLE:
        return able
    words = {c: sum(len(value.split()) for value in values[c]) / len(values[c]) for c in able}
    texts = [c for c in able if words[c] > 1.5] or able
    return sorted(texts, key=lambda c: -words[c])


def _holder(role: str) -> Callable[[Any], bool]:
    """Return what tells whether a value may be of `role`."""
    if role in ("messages", "conversations", "spans"):
        return lambda value: isinstance(value, list) and (not value or isinstance(value[0], dict))
    if role in ("tokens", "tags", "tools"):
        return lambda value: isinstance(value, list)
    if role == "answers":
        return lambda value: isinstance(value, dict)
    if role == "label":
        return lambda value: not isinstance(value, dict)
    return lambda value: isinstance(value, str)


def write_flags(pairs: Mapping[str, str]) -> str:
    """Return `--map` flags as a shell takes them."""
    return " ".join(f"--map {shlex.quote(f'{role}={column}')}" for role, column in pairs.items())


def chosen_roles(names: Mapping[str, str], value: object) -> dict[str, str]:
    """Return what the columns of a preference set are, by a value of the chosen answers."""
    if isinstance(value, list):
        users = any(isinstance(t, dict) and t.get("role") == "user" for t in value)
        if users or "prompt" not in names:
            return {"messages": names["chosen"]}
    if "prompt" in names:
        return {"prompt": names["prompt"], "completion": names["chosen"]}
    return {"text": names["chosen"]}
