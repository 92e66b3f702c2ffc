"""The values of a row by what they are for: what every builder of examples reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlevel.data.formats.columns import JOINER, NESTED
from ftlevel.data.formats.detect import Format
from ftlevel.data.formats.turns import Unusable, check_text, parse_json, parse_turn_list
from ftlevel.data.sources.table import Row, Table
from ftlevel.data.sources.uniform import kind_of

_TURNS = ("prompt", "completion", "chosen", "rejected")
"""Roles whose value is a text or turns."""


class Roles:
    """The values of one row, by role.

    Args:
        format_: which column each role has.
        table: where the rows are.
    """

    def __init__(self, format_: Format, table: Table) -> None:
        self.columns = format_.columns
        self.inner: Mapping[str, str] = format_.inner
        self.table = table
        self.row: Row = {}
        self.index = 0

    def turn_to(self, row: Row, index: int) -> None:
        """Go on with `row`, the one at `index` of the table."""
        self.row, self.index = row, index

    def __contains__(self, role: str) -> bool:
        return role in self.columns

    def get(self, role: str) -> Any:
        """Return the value of `role`; None where the format has no column for it.

        JSON text is parsed where a list or an object is expected, and in a CSV cell also where
        turns may stand instead of a text.
        """
        column = self.columns.get(role)
        if column is None:
            return None
        value = self._find(column)
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
            return value
        if role in NESTED:
            try:
                return parse_json(value, repr(column))
            except Unusable as error:
                raise Unusable(
                    f"{error}. Write lists and objects as JSON, with json.dumps"
                ) from None
        is_cell = role in _TURNS and self.table.has_text_cells(self.index)
        return parse_turn_list(value) if is_cell else value

    def _find(self, column: str) -> Any:
        """Return the value of a column, of several that are joined, or of a key inside of one."""
        if column in self.row:
            return self.row[column]
        if "+" in column:
            return JOINER.join(filter(None, map(self._joined, column.split("+"))))
        return self._reach(column)

    def _joined(self, column: str) -> str:
        """Return the text of a column that is joined with others; it may be empty or null."""
        value = self.row[column] if column in self.row else self._reach(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        if not isinstance(value, str):
            raise Unusable(f"{column!r} is {kind_of(value)}, and only texts can be joined")
        return value

    def _reach(self, column: str) -> Any:
        """Return the value inside of objects that `column` leads to, key by key."""
        value: Any = self.row
        for part in column.split("."):
            if value is self.row and part not in value:
                raise Unusable(f"has no {part!r}")
            if not isinstance(value, dict) or part not in value:
                raise Unusable(f"{column!r} is not there ({part!r} is missing)")
            value = value[part]
        return value

    def text(self, role: str) -> str:
        """Return the text of `role`, which must not be empty."""
        return check_text(self.get(role), repr(self.columns[role]))

    def text_or_empty(self, role: str) -> str:
        """Return the text of `role`, or an empty string for null, or for no such column."""
        value = self.get(role)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        return check_text(value, repr(self.columns[role]))
