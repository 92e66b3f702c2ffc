"""Convert the rows of a table to examples, and report the rows that cannot be converted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from ftlevel.data.formats.columns import columns_exist
from ftlevel.data.formats.detect import Format
from ftlevel.data.formats.examples import Example, RoleValues
from ftlevel.data.formats.turns import UnusableRowError
from ftlevel.data.sources.lines import LineRows
from ftlevel.data.sources.table import BadRow, Row, Table, describe_bad_rows
from ftlevel.errors import InputError, join_names, quote


class LazyExamples(Sequence[Example]):
    """Examples of a large table, built on access; all rows of `table` must be convertible."""

    def __init__(self, table: Table, format_: Format) -> None:
        self._table = table
        self._roles = RoleValues(format_, table)
        self._build = format_.build

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return one example, or a list for a slice."""
        if isinstance(index, slice):
            chosen = range(*index.indices(len(self)))
            rows = self._table.rows[index]
            return [self._make(row, i) for i, row in zip(chosen, rows, strict=True)]
        at = range(len(self))[index]
        return self._make(self._table.rows[at], at)

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples in order."""
        return map(self._make, self._table.rows, range(len(self)))

    def _make(self, row: Row, index: int) -> Example:
        self._roles.set_row(row, index)
        return self._build(self._roles)


def to_examples(table: Table, format_: Format) -> Sequence[Example]:
    """Return the examples of `table`; raise `InputError` for a bad row or a missing column."""
    examples, bad = convert_rows(table, format_)
    if bad:
        raise InputError(describe_bad_rows(table, bad))
    return examples


def convert_rows(table: Table, format_: Format) -> tuple[Sequence[Example], list[BadRow]]:
    """Return the examples of `table`, and the bad rows; raise `InputError` for a missing column."""
    lacking = [
        quote(column)
        for column in format_.columns.values()
        if not columns_exist(column, table.columns)
    ]
    if lacking:
        raise InputError(
            f"{table.source}: has no column {join_names(lacking)}. Columns: "
            f"{join_names(map(quote, table.columns))}. Use the same columns in every split."
        )
    build = format_.build
    roles = RoleValues(format_, table)
    examples: list[Example] = []
    bad: list[BadRow] = []
    lazy = isinstance(table.rows, LineRows)
    for index, row in enumerate(table.rows):
        roles.set_row(row, index)
        try:
            example = build(roles)
            if not lazy:
                examples.append(example)
        except UnusableRowError as error:
            bad.append(BadRow(table.lines[index], str(error), error.finding))
    return (LazyExamples(table, format_) if lazy and not bad else examples), bad
