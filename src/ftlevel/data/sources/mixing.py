"""Several tables as one: each row keeps its place, and no row comes twice.

The rows are laid evenly through one another, so that the first N of them are a fair sample too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ftlevel.data.sources.table import BadRow, Part, Table
from ftlevel.errors import InputError, listing, quote


def join_tables(tables: Sequence[Table]) -> Table:
    """Return one table of all rows of `tables`, which must have the same columns.

    Raises:
        InputError: they have not.
    """
    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    for other in tables[1:]:
        if set(other.columns) != set(first.columns):
            raise InputError(
                f"{other.source}: has the columns {_quoted(other)}, and {first.source} has "
                f"{_quoted(first)}. Data sets that are trained on together need the same columns."
            )
    parts, base = [], 0
    dropped: list[BadRow] = []
    lines: list[list[int]] = []
    for table in tables:
        parts.append(Part(base, table))
        lines.append([base + line for line in table.lines])
        dropped += [replace(row, line=base + row.line) for row in table.dropped]
        base += max([*table.lines, *(row.line for row in table.dropped)], default=0)
    order = _interleave([len(table) for table in tables])
    return Table(
        [tables[which].rows[index] for which, index in order],
        [lines[which][index] for which, index in order],
        " + ".join(table.source for table in tables),
        first.unit,
        tuple(dropped),
        first.label_names,
        tuple(parts),
        tuple(note for table in tables for note in table.notes),
        text_cells=all(table.text_cells for table in tables),
        ignored=tuple(dict.fromkeys(name for table in tables for name in table.ignored)),
    )


def mix_tables(
    tables: Sequence[Table], shares: Sequence[float], seed: int
) -> tuple[list[Table], list[str]]:
    """Return as many rows of each table as make `shares` true, and a note on those left out.

    The set is as large as it can be without a row that comes twice: the table that is shortest for
    its share gives all of its rows, the others a sample by `seed`.

    Raises:
        InputError: a table would give no row.
    """
    total = sum(shares)
    whole = min(len(table) * total / share for table, share in zip(tables, shares, strict=True))
    counts = [int(whole * share / total + 1e-9) for share in shares]
    taken = []
    for table, count, share in zip(tables, counts, shares, strict=True):
        if count < 1:
            raise InputError(
                f"--mix {','.join(f'{s:g}' for s in shares)}: a share of {share:g} leaves no row "
                f"of {table.source} beside {min(map(len, tables)):,} rows. Give it more."
            )
        chosen = sorted(random.Random(seed).sample(range(len(table)), count))
        taken.append(replace(table.take(chosen), dropped=table.dropped))
    kept = listing(
        f"{count:,} of {len(table):,} rows of {table.source}"
        for count, table in zip(counts, tables, strict=True)
    )
    return taken, [f"mixed {' : '.join(f'{share:g}' for share in shares)}: {kept}"]


def _quoted(table: Table) -> str:
    return listing(map(quote, table.columns))


def _interleave(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (table, row) for all rows, each table's spread evenly over the whole."""
    places = (
        ((index + 0.5) / length, which, index)
        for which, length in enumerate(lengths)
        for index in range(length)
    )
    return [(which, index) for _, which, index in sorted(places)]
