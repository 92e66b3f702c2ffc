"""A column as the user names it: by its name, its number, a key inside of it, or several joined."""

from __future__ import annotations

from collections.abc import Sequence

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
