"""Tables: rows in memory with the line each came from, and the handling of bad rows.

Other modules identify a row by `Table.where`. This module must not read files or know tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from ftlevel.data.sources.lines import LineRows
from ftlevel.errors import InputError

OnBadRow: TypeAlias = Literal["error", "skip"]
Row: TypeAlias = dict[str, Any]

MOST_SHOWN = 5  # maximum number of bad rows listed in a message


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used; `finding` is the field of `config.gate` that covers it, or "".

    `line` is 1-based, or the row number if the source has no lines. `reason` has no final period.
    """

    line: int
    reason: str
    finding: str = ""


@dataclass(frozen=True)
class Part:
    """A table within a joined table; its lines are offset by `base`."""

    base: int
    table: Table


@dataclass(frozen=True)
class Table:
    """The rows of one split.

    Attributes:
        rows: one dict per row, all with the same keys; decoded on access for large files.
        lines: 1-based first line of each row, or its row number, as `unit` says.
        dropped: bad rows removed by `on_bad_row="skip"`, in order of line.
        label_names: class names by column, where the source declares them.
        parts: the tables it was joined from, by increasing base.
        text_cells: whether lists and objects can occur only as JSON text.
        ignored: columns excluded by the user; rows may still contain them.
    """

    rows: Sequence[Row]
    lines: Sequence[int]
    source: str
    unit: Literal["line", "row"] = "line"
    dropped: tuple[BadRow, ...] = ()
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()
    text_cells: bool = False
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """The column names in the order of the first row, without the ignored ones."""
        return [name for name in self.rows[0] if name not in self.ignored] if self.rows else []

    def without_columns(self, names: Iterable[str]) -> Table:
        """Return the table with the existing columns among `names` ignored."""
        found = [name for name in names if name in self.columns]
        return replace(self, ignored=(*self.ignored, *found)) if found else self

    def where(self, index: int) -> str:
        """Return `path:line` (or `name row N`) of the row at `index`."""
        return self.place(self.lines[index])

    def place(self, line: int) -> str:
        """Return `path:line`, or `name row N` if the source has no lines."""
        table, line = self._part_of(line)
        return f"{table.source}:{line}" if table.unit == "line" else f"{table.source} row {line}"

    def has_text_cells(self, index: int) -> bool:
        """Return `text_cells` of the part that the row at `index` belongs to."""
        return self._part_of(self.lines[index])[0].text_cells if self.parts else self.text_cells

    def _part_of(self, line: int) -> tuple[Table, int]:
        """Return the original table that contains `line`, and the line number within it."""
        for part in reversed(self.parts):
            if line > part.base:
                return part.table._part_of(line - part.base)
        return self, line

    def take(self, indices: Iterable[int]) -> Table:
        """Return a table of the rows at `indices`, in that order, with empty `dropped`."""
        if isinstance(self.rows, LineRows):
            rows = self.rows.take(indices)
            return replace(self, rows=rows, lines=rows.lines, dropped=())
        chosen = list(indices)
        lines = [self.lines[index] for index in chosen]
        return replace(self, rows=[self.rows[i] for i in chosen], lines=lines, dropped=())


def handle_bad_rows(table: Table, bad: Sequence[BadRow], on_bad_row: OnBadRow) -> Table:
    """Return `table` without the rows in `bad`, which are added to `dropped`.

    `bad` may include rows that are not in the table, such as invalid JSON. Raises `InputError` if
    `on_bad_row` is "error" and there are bad rows, or if no row remains.
    """
    if not bad:
        return table
    if on_bad_row == "error":
        raise InputError(describe_bad_rows(table, bad))
    lines = {row.line for row in bad}
    kept = table.take(i for i, line in enumerate(table.lines) if line not in lines)
    dropped = tuple(sorted((*table.dropped, *bad), key=lambda row: row.line))
    if not kept.rows:
        first = dropped[0]
        raise InputError(
            f"{table.place(first.line)}: {first.reason}. No row is left: --on-bad-row skip would "
            f"drop all {len(lines):,} rows of {table.source}. Fix the file."
        )
    return replace(kept, dropped=dropped)


def describe_bad_rows(table: Table, bad: Sequence[BadRow]) -> list[str]:
    """Return one message per bad row for the first few, then a summary with the count."""
    ordered = sorted(bad, key=lambda row: row.line)
    if len(ordered) == 1:
        row = ordered[0]
        return [
            f"{table.place(row.line)}: {row.reason}. "
            f"Fix the {table.unit}, or drop bad rows with --on-bad-row skip."
        ]
    total = len({*table.lines, *(row.line for row in [*bad, *table.dropped])})
    count = len({row.line for row in bad})
    shown = [f"{table.place(row.line)}: {row.reason}." for row in ordered[:MOST_SHOWN]]
    more = f" (the first {MOST_SHOWN} are above)" if len(ordered) > MOST_SHOWN else ""
    return [
        *shown,
        f"{table.source}: {count:,} of {total:,} rows are bad{more}. "
        "Fix them, or drop bad rows with --on-bad-row skip.",
    ]


def describe_dropped(table: Table) -> list[str]:
    """Return a note on the dropped rows; empty if there are none."""
    if not table.dropped:
        return []
    count = len({row.line for row in table.dropped})
    total = count + len(table)
    shown = "; ".join(
        f"{table.place(row.line) if table.parts else f'{table.unit} {row.line}'}: {row.reason}"
        for row in table.dropped[:MOST_SHOWN]
    )
    more = "; …" if len(table.dropped) > MOST_SHOWN else ""
    return [f"{table.source}: dropped {count:,} of {total:,} rows ({shown}{more})"]
