"""Rows in memory, each with the place it came from, and what is said about rows that are bad.

Every later room names a row with `Table.where`. This room must not read files or know of tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from ftlevel.data.sources.lines import LineRows
from ftlevel.errors import InputError

OnBadRow: TypeAlias = Literal["error", "skip"]
Row: TypeAlias = dict[str, Any]

MOST_SHOWN = 5  # bad rows that a message names; the others are counted


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        line: its 1-based line, or its row number where the source has no lines.
        reason: what is wrong with it, with the value; no full stop.
        finding: the field of `config.gate` that it falls under; "" for none.
    """

    line: int
    reason: str
    finding: str = ""


@dataclass(frozen=True)
class Part:
    """A table inside a larger one, whose lines are counted there from `base`."""

    base: int
    table: Table


@dataclass(frozen=True)
class Table:
    """The rows of one split.

    Attributes:
        rows: one dict a row, all with the same keys; of a large file, read when asked for.
        lines: for each row the 1-based line it begins on, or its row number in the source.
        source: the path or name that messages begin with.
        unit: whether `lines` counts lines of a text file, or rows.
        dropped: the rows that `on_bad_row="skip"` left out, in order of line.
        label_names: names of the classes, for columns whose source declares them.
        parts: the tables that it was joined from, by growing base; empty for a single one.
        notes: what was chosen in reading it, to be shown.
        text_cells: whether lists and objects can only be there as JSON text.
        ignored: columns that the user leaves out; rows may have them.
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
        """The names of the columns that are used, in the order of the first row."""
        return [name for name in self.rows[0] if name not in self.ignored] if self.rows else []

    def without_columns(self, names: Iterable[str]) -> Table:
        """Return the table without those of the columns `names` that it has."""
        found = [name for name in names if name in self.columns]
        return replace(self, ignored=(*self.ignored, *found)) if found else self

    def where(self, index: int) -> str:
        """Return `path:line` (or `name row N`) of the row at `index` of `rows`."""
        return self.place(self.lines[index])

    def place(self, line: int) -> str:
        """Return `path:line`, or `name row N` where the source has no lines."""
        table, line = self._part_of(line)
        return f"{table.source}:{line}" if table.unit == "line" else f"{table.source} row {line}"

    def has_text_cells(self, index: int) -> bool:
        """Return `text_cells` of the table that the row at `index` came from."""
        return self._part_of(self.lines[index])[0].text_cells if self.parts else self.text_cells

    def _part_of(self, line: int) -> tuple[Table, int]:
        """Return the single table that holds `line`, and the line's number there."""
        for part in reversed(self.parts):
            if line > part.base:
                return part.table._part_of(line - part.base)
        return self, line

    def take(self, indices: Iterable[int]) -> Table:
        """Return a table of the rows at `indices`, in that order; `dropped` stays behind."""
        if isinstance(self.rows, LineRows):
            rows = self.rows.take(indices)
            return replace(self, rows=rows, lines=rows.lines, dropped=())
        chosen = list(indices)
        lines = [self.lines[index] for index in chosen]
        return replace(self, rows=[self.rows[i] for i in chosen], lines=lines, dropped=())


def resolve_bad(table: Table, bad: Sequence[BadRow], on_bad_row: OnBadRow) -> Table:
    """Return `table` without the rows in `bad`, counted in `dropped`; or refuse it.

    A bad row that never made it into `table.rows` (a line that is no JSON) is counted as well.

    Raises:
        InputError: there are bad rows and `on_bad_row` is "error", or no row is left.
    """
    if not bad:
        return table
    if on_bad_row == "error":
        raise InputError(describe_bad(table, bad))
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


def describe_bad(table: Table, bad: Sequence[BadRow]) -> list[str]:
    """Return one message a bad row, for the first few, and a last one with the count."""
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
    """Return notes on the rows that were left out; empty when none was."""
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
