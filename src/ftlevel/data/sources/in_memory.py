"""Rows that a program hands over: frames, data sets of `datasets`, lists and whatever yields rows.

They become tables as files do: their places are numbers, and rows that differ from most are named.
A message says what is wrong with a row by its number, and never shows what was handed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ftlevel.config import RowsInMemory
from ftlevel.data.sources.hub import dataset_table
from ftlevel.data.sources.readers.parquet import check_columns
from ftlevel.data.sources.table import OnBadRow, Table, resolve_bad
from ftlevel.data.sources.uniform import find_odd_rows
from ftlevel.errors import InputError

_KINDS = "a DataFrame, a datasets.Dataset or DatasetDict, or a list of dicts"


def load_memory_tables(
    given: RowsInMemory, on_bad_row: OnBadRow, most: int | None, ignored: Sequence[str] = ()
) -> dict[str, Table]:
    """Return what was handed over as tables by split; what has no splits is all for training.

    Rows that can be gone through only once are kept with `given` (mutated).

    Args:
        given: the rows.
        on_bad_row: what is done to a row unlike most others.
        most: the number of rows to keep of each split; None keeps all.
        ignored: columns that are left out.

    Raises:
        InputError: they are no rows, or there are none, or some are bad.
    """
    if isinstance(given.rows, Iterator):
        given.rows = list(islice(given.rows, most))
    rows = given.rows
    if not isinstance(rows, Mapping):
        return {"train": _to_table(rows, given.said, on_bad_row, (most, ignored))}
    if not all(_is_split(part) for part in rows.values()):
        raise InputError(
            "the rows in memory are a dict of columns. Expected rows: "
            f"{_KINDS}; datasets.Dataset.from_dict(…) makes one of columns."
        )
    return {
        str(name): _to_table(part, f"{given.said} ({name})", on_bad_row, (most, ignored))
        for name, part in rows.items()
    }


def _is_split(part: Any) -> bool:
    """Whether a value of a dict is a split, and not a column."""
    if isinstance(part, list | tuple):
        return bool(part) and isinstance(part[0], Mapping)
    return hasattr(part, "columns") or hasattr(part, "features")


def _to_table(
    rows: Any, source: str, on_bad_row: OnBadRow, rest: tuple[int | None, Sequence[str]]
) -> Table:
    most, ignored = rest
    if hasattr(rows, "features") and hasattr(rows, "with_format") and hasattr(rows, "__len__"):
        table = dataset_table(rows, source, most, ignored)
    else:
        some = list(islice(_rows_of(rows, source), most))
        there = tuple(name for name in ignored if some and name in some[0])
        plain = [_plain({k: v for k, v in row.items() if k not in there}) for row in some]
        numbers = list(range(1, len(plain) + 1))
        table = Table(plain, numbers, source, unit="row", ignored=there)
    if not len(table):
        raise InputError(f"{source}: has 0 rows. Give some.")
    return resolve_bad(table, find_odd_rows(table.rows, table.lines), on_bad_row)


def _rows_of(rows: Any, source: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows, of a frame with None where a value is missing."""
    if hasattr(rows, "iloc") and hasattr(rows, "columns"):
        names = [str(name) for name in rows.columns]
        check_columns(names, source)
        columns = [rows.iloc[:, number] for number in range(len(names))]
        pairs = [zip(c.astype(object), c.isna(), strict=True) for c in columns]
        for values in zip(*pairs, strict=True):
            cells = (None if gone else value for value, gone in values)
            yield dict(zip(names, cells, strict=True))
        return
    if hasattr(rows, "to_pylist"):  # Arrow's
        rows = rows.to_pylist()
    if not isinstance(rows, Iterable):
        raise InputError(f"the rows in memory are {_a(rows)}. Expected {_KINDS}.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise InputError(
                f"{source} row {number} is {_a(row)}. Expected a dict from column to value, such "
                "as {'text': …, 'label': …}."
            )
        yield row


def _a(value: Any) -> str:
    return f"of type {type(value).__name__}"


def _plain(value: Any) -> Any:
    """Return `value` as JSON would give it: without numpy's numbers and arrays, and tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if type(value).__module__ == "numpy":
        return value.tolist()
    return value
