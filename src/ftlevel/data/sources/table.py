"""Tables: rows in memory with the line each came from; joining tables, and handling invalid rows.

Other modules identify a row by `Table.where`. This module must not read files or know tasks.
`join_tables` and `mix_tables` repeat no row and interleave rows evenly, so that the first N rows
are a fair sample.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from ftlevel.data.sources.lines import LineRows
from ftlevel.errors import InputError, did_you_mean, join_names, quote

OnBadRow: TypeAlias = Literal["error", "skip"]
Row: TypeAlias = dict[str, Any]

MAX_SHOWN = 5  # maximum number of invalid rows listed in a message


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used; `finding` is the data check in `config.gate` that it fails, or "".

    `line` is 1-based, or the row number if the source has no lines. `message` has no final period.
    """

    line: int
    message: str
    finding: str = ""


@dataclass(frozen=True)
class Part:
    """A table that was joined into another; `base` was added to the line numbers of its rows."""

    base: int
    table: Table


@dataclass(frozen=True)
class Table:
    """The rows of one split.

    Attributes:
        rows: one dict per row, all with the same keys; decoded on access for large files.
        lines: 1-based first line of each row, or its row number, as `unit` says.
        dropped: invalid rows removed by `on_bad_row="skip"`, in order of line.
        label_names: class names by column, where the source declares them.
        parts: the tables that were joined into this one, by increasing base.
        text_cells: whether cells are text only, as in CSV; lists and objects are then JSON text.
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
    def column_names(self) -> list[str]:
        """The column names in the order of the first row, without those in `ignored`."""
        return [name for name in self.rows[0] if name not in self.ignored] if self.rows else []

    def without_columns(self, names: Iterable[str]) -> Table:
        """Returns the table without the columns in `names`; unknown names are ignored."""
        existing = [name for name in names if name in self.column_names]
        return replace(self, ignored=(*self.ignored, *existing)) if existing else self

    def where(self, index: int) -> str:
        """Returns `path:line` (or `name row N`) of the row at `index`."""
        return self.location(self.lines[index])

    def location(self, line: int) -> str:
        """Returns `path:line`, or `name row N` if the source has no lines."""
        table, line = self._part_of(line)
        return f"{table.source}:{line}" if table.unit == "line" else f"{table.source} row {line}"

    def has_text_cells(self, index: int) -> bool:
        """Returns whether lists and objects in the row at `index` are JSON text, as in CSV."""
        return self._part_of(self.lines[index])[0].text_cells if self.parts else self.text_cells

    def _part_of(self, line: int) -> tuple[Table, int]:
        """Returns the original table that contains `line`, and the line number within it."""
        for part in reversed(self.parts):
            if line > part.base:
                return part.table._part_of(line - part.base)
        return self, line

    def take(self, indices: Iterable[int]) -> Table:
        """Returns a table of the rows at `indices`, in that order, with empty `dropped`."""
        if isinstance(self.rows, LineRows):
            rows = self.rows.take(indices)
            return replace(self, rows=rows, lines=rows.lines, dropped=())
        indices = list(indices)
        lines = [self.lines[index] for index in indices]
        return replace(self, rows=[self.rows[i] for i in indices], lines=lines, dropped=())

    @property
    def num_dropped(self) -> int:
        """Number of invalid rows removed; a row may have several entries in `dropped`."""
        return len({row.line for row in self.dropped})

    def head(self, num_rows: int) -> Table:
        """Returns a table of the first `num_rows` rows."""
        if len(self) <= num_rows:
            return self
        return replace(self.take(range(num_rows)), dropped=self.dropped)


def check_same_columns(
    one: tuple[str, Sequence[str]], other: tuple[str, Sequence[str]], noun: str
) -> None:
    """Raise `InputError` if two sources, each given as (name, columns), have different columns."""
    if set(one[1]) != set(other[1]):
        raise InputError(
            f"{one[0]}: has the columns {join_names(map(quote, one[1]))}, and {other[0]} has "
            f"{join_names(map(quote, other[1]))}. {noun} together need the same columns."
        )


def join_tables(tables: Sequence[Table]) -> Table:
    """Returns one table with the interleaved rows of `tables`; their columns must be the same."""
    first, *others = tables
    if not others:
        return first
    label_names = dict(first.label_names)
    for other in others:
        check_same_columns(
            (other.source, other.column_names),
            (first.source, first.column_names),
            "Data sets that are trained on",
        )
        for column, names in other.label_names.items():
            if names != (expected := label_names.setdefault(column, names)):
                source = next(table.source for table in tables if column in table.label_names)
                raise InputError(
                    f"{other.source}: the classes of {column!r} are {join_names(names)}, and those "
                    f"of {source} are {join_names(expected)}. The same number would be a "
                    f"different class. Use class names instead of numbers, or the same order in "
                    f"both."
                )
    parts, base = [], 0
    dropped_rows: list[BadRow] = []
    rows: list[tuple[float, int, int, int]] = []  # relative position, table, row, line
    for number, table in enumerate(tables):
        parts.append(Part(base, table))
        positions = ((index + 0.5) / len(table) for index in range(len(table)))
        rows += (
            (position, number, index, base + line)
            for index, (position, line) in enumerate(zip(positions, table.lines, strict=True))
        )
        dropped_rows += [replace(row, line=base + row.line) for row in table.dropped]
        base += max([*table.lines, *(row.line for row in table.dropped)], default=0)
    rows.sort()
    return Table(
        [tables[number].rows[index] for _, number, index, _ in rows],
        [line for *_, line in rows],
        " + ".join(table.source for table in tables),
        first.unit,
        tuple(dropped_rows),
        label_names,
        tuple(parts),
        tuple(note for table in tables for note in table.notes),
        text_cells=all(table.text_cells for table in tables),
        ignored=tuple(dict.fromkeys(name for table in tables for name in table.ignored)),
    )


def mix_tables(
    tables: Sequence[Table], shares: Sequence[float], seed: int
) -> tuple[list[Table], list[str]]:
    """Returns a sample of each table, sized in proportion to `shares`, and a note with the counts.

    The table with the fewest rows for its share is used completely. Raises `InputError` for a share
    below one row.
    """
    total = sum(shares)
    size = min(len(table) * total / share for table, share in zip(tables, shares, strict=True))
    counts = [int(size * share / total + 1e-9) for share in shares]
    samples = []
    for table, num_rows, share in zip(tables, counts, shares, strict=True):
        if num_rows < 1:
            raise InputError(
                f"--mix {','.join(f'{s:g}' for s in shares)}: a share of {share:g} leaves no row "
                f"of {table.source} next to {min(map(len, tables)):,} rows. Raise it."
            )
        indices = sorted(random.Random(seed).sample(range(len(table)), num_rows))
        samples.append(replace(table.take(indices), dropped=table.dropped))
    used = join_names(
        f"{num_rows:,} of {len(table):,} rows of {table.source}"
        for num_rows, table in zip(counts, tables, strict=True)
    )
    return samples, [f"mixed {' : '.join(f'{share:g}' for share in shares)}: {used}"]


def handle_bad_rows(table: Table, errors: Sequence[BadRow], on_bad_row: OnBadRow) -> Table:
    """Returns `table` without the rows in `errors`, which are added to `dropped`.

    `errors` may include rows that are not in the table, such as invalid JSON. Raises `InputError`
    if `on_bad_row` is "error" and there are invalid rows, or if no row remains.
    """
    if not errors:
        return table
    if on_bad_row == "error":
        raise InputError(describe_bad_rows(table, errors))
    lines = {row.line for row in errors}
    valid = table.take(i for i, line in enumerate(table.lines) if line not in lines)
    dropped_rows = tuple(sorted((*table.dropped, *errors), key=lambda row: row.line))
    if not valid.rows:
        first = dropped_rows[0]
        raise InputError(
            f"{table.location(first.line)}: {first.message}. No row is left: --on-bad-row skip "
            f"would drop all {len(lines):,} rows of {table.source}. Fix the file."
        )
    return replace(valid, dropped=dropped_rows)


def describe_bad_rows(
    table: Table,
    errors: Sequence[BadRow],
    advice: str = ", or drop bad rows with --on-bad-row skip",
) -> list[str]:
    """Returns one message per bad row for the first few, then a summary with count and advice."""
    ordered = sorted(errors, key=lambda row: row.line)
    if len(ordered) == 1:
        row = ordered[0]
        return [f"{table.location(row.line)}: {row.message}. Fix the {table.unit}{advice}."]
    total = len({*table.lines, *(row.line for row in [*errors, *table.dropped])})
    num_rows = len({row.line for row in errors})
    rest = f" (the first {MAX_SHOWN} are above)" if len(ordered) > MAX_SHOWN else ""
    return [
        *(f"{table.location(row.line)}: {row.message}." for row in ordered[:MAX_SHOWN]),
        f"{table.source}: {num_rows:,} of {total:,} rows are bad{rest}. Fix them{advice}.",
    ]


def describe_dropped(table: Table) -> list[str]:
    """Returns a note on the dropped rows; empty if there are none."""
    if not table.dropped:
        return []
    total = table.num_dropped + len(table)
    reasons = "; ".join(
        f"{table.location(row.line) if table.parts else f'{table.unit} {row.line}'}: {row.message}"
        for row in table.dropped[:MAX_SHOWN]
    )
    rest = "; …" if len(table.dropped) > MAX_SHOWN else ""
    return [f"{table.source}: dropped {table.num_dropped:,} of {total:,} rows ({reasons}{rest})"]


# int and float are the same type. null has no type and is allowed in any column.
_JSON_TYPES: dict[type, str] = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}

_Shape = tuple[tuple[str, ...], tuple[type, ...]]


def json_type_name(value: object) -> str:
    """Returns the name of a JSON type for messages, such as "a string" or "a number"."""
    return "null" if value is None else _JSON_TYPES.get(type(value), type(value).__name__)


def to_float(value: Any) -> float:
    """Returns `value` as a float; NaN if it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def is_encodable(text: str) -> bool:
    """Returns whether `text` is valid Unicode; False if it has half of a surrogate pair."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


class RowShapeCounter:
    """Counter of the combinations of keys and types in rows; each row costs one dict lookup."""

    def __init__(self) -> None:
        self._groups: dict[_Shape, list[int]] = {}  # number of rows, index of the first
        self._count = 0

    def add(self, row: Row) -> None:
        """Count a row."""
        self._groups.setdefault(_shape_of(row), [0, self._count])[0] += 1
        self._count += 1

    def get_schema(self, lines: Sequence[int]) -> RowSchema:
        """Returns the most frequent keys of the counted rows, with the most frequent types."""
        sizes: Counter[frozenset[str]] = Counter()
        for (keys, _), (size, _) in self._groups.items():
            sizes[frozenset(keys)] += size
        names, num_rows = next(iter(sizes.most_common(1)), (frozenset(), 0))  # ties: the first one
        groups = {shape: group for shape, group in self._groups.items() if names == set(shape[0])}
        counts: dict[str, Counter[str]] = {}
        first: dict[tuple[str, str], int] = {}
        for (keys, types), (size, start) in groups.items():
            for key, type_ in zip(keys, types, strict=True):
                if name := _JSON_TYPES.get(type_):
                    counts.setdefault(key, Counter())[name] += size
                    first.setdefault((key, name), start)
        common = {key: count.most_common(1)[0][0] for key, count in counts.items()}
        examples = {key: (name, lines[first[key, name]]) for key, name in common.items()}
        return RowSchema(next(iter(groups), ((), ()))[0], examples, num_rows)

    def get_inconsistent(self, rows: Sequence[Row], lines: Sequence[int]) -> list[BadRow]:
        """Returns a `BadRow` for each counted row that differs from most in keys or types."""
        schema = self.get_schema(lines)
        return [] if all(map(schema.has, self._groups)) else schema.get_inconsistent(rows, lines)


def get_inconsistent_rows(rows: Sequence[Row], lines: Sequence[int]) -> list[BadRow]:
    """Returns a `BadRow` for each row whose keys or types differ from those of most rows."""
    shapes = RowShapeCounter()
    for row in rows:
        shapes.add(row)
    return shapes.get_inconsistent(rows, lines)


def _shape_of(row: Row) -> _Shape:
    return tuple(row), tuple(map(type, row.values()))


@dataclass(frozen=True)
class RowSchema:
    """Keys that most rows have, and their types.

    `types` maps each column to its type and the line of an example. `count` is the number of rows.
    """

    column_names: tuple[str, ...]
    types: dict[str, tuple[str, int]]
    count: int

    def has(self, shape: _Shape) -> bool:
        """Returns whether rows of these keys and types fit the schema."""
        return set(shape[0]) == set(self.column_names) and not any(map(self._is_wrong, *shape))

    def _is_wrong(self, key: str, type_: type) -> bool:
        name = _JSON_TYPES.get(type_)
        return name is not None and key in self.types and name != self.types[key][0]

    def get_inconsistent(self, rows: Sequence[Row], lines: Sequence[int]) -> list[BadRow]:
        """Returns a `BadRow` for each row with other keys than the schema, and per wrong type."""
        errors = []
        for row, line in zip(rows, lines, strict=True):
            if row.keys() != set(self.column_names):
                message = _describe_keys(tuple(row), self.column_names, self.count)
                errors.append(BadRow(line, message))
                continue
            for key, value in row.items():
                if self._is_wrong(key, type(value)):
                    errors.append(BadRow(line, _describe_type(key, value, *self.types[key])))
        return errors


def _describe_keys(keys: tuple[str, ...], column_names: tuple[str, ...], num_rows: int) -> str:
    missing = [key for key in column_names if key not in keys]
    extra = [key for key in keys if key not in column_names]
    others = f"the {num_rows:,} other rows" if num_rows > 1 else "the other row"
    lacks, has = join_names(map(quote, missing)), join_names(map(quote, extra))
    if missing and extra:
        hint = did_you_mean(extra[0], missing).strip()
        aside = f" ({hint[0].lower()}{hint[1:]})" if hint else ""
        return f"lacks {lacks} and has {has}, unlike {others}{aside}"
    if missing:
        verb = "have" if num_rows > 1 else "has"
        return f"lacks {lacks}, which {others} {verb} (a value may be null, the key must be there)"
    return f"has {has}, which {others} {'lack' if num_rows > 1 else 'lacks'}"


def _describe_type(key: str, value: object, type_: str, line: int) -> str:
    return (
        f"{key!r} is {json_type_name(value)} ({quote(value)}), but {type_} in most rows "
        f"(line {line} for one)"
    )
