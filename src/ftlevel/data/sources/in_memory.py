"""Rows that a program hands over: frames, data sets of `datasets`, lists and whatever yields rows.

They become tables as files do: their places are numbers, and rows that differ from most are named.
A message says what is wrong with a row by its number, and never shows what was handed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ftlevel.config import RowsInMemory
from ftlevel.data.sources.hub import dataset_table
from ftlevel.data.sources.readers.parquet import (
    arrow_rows,
    check_columns,
    clean_rows,
    clean_value,
)
from ftlevel.data.sources.streams import describe_null_keys
from ftlevel.data.sources.table import OnBadRow, Row, Table, resolve_bad
from ftlevel.data.sources.uniform import find_odd_rows
from ftlevel.errors import InputError, listing

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
        null_keys: Counter[str] = Counter()
        plain = list(islice(iterate_rows(rows, source, null_keys), most))
        there = tuple(name for name in ignored if plain and name in plain[0])
        if there:
            plain = [{k: v for k, v in row.items() if k not in there} for row in plain]
        numbers = list(range(1, len(plain) + 1))
        notes = tuple(describe_null_keys(null_keys, source))
        table = Table(plain, numbers, source, unit="row", notes=notes, ignored=there)
    if not len(table):
        raise InputError(f"{source}: has 0 rows. Give some.")
    return resolve_bad(table, find_odd_rows(table.rows, table.lines), on_bad_row)


def iterate_rows(rows: Any, source: str, null_keys: Counter[str] | None = None) -> Iterator[Row]:
    """Yield rows in memory as JSON would give them.

    Args:
        rows: a frame, an Arrow table, a data set of `datasets`, or any iterable of mappings. A
            missing value of a frame becomes None.
        source: the name that messages begin with.
        null_keys: counts the null keys that Arrow added and that are dropped, by path (mutated).

    Raises:
        InputError: they are no rows.
    """
    null_keys = Counter() if null_keys is None else null_keys
    if hasattr(rows, "iloc") and hasattr(rows, "columns"):
        yield from _frame_rows(rows, source, null_keys)
    elif hasattr(rows, "to_pylist"):  # Arrow's
        check_columns(rows.schema.names, source)
        yield from arrow_rows(rows, null_keys)
    else:
        schema = getattr(getattr(rows, "features", None), "arrow_schema", None)
        is_arrow = hasattr(rows, "features")
        for row in _check_rows(rows, source):
            plain = {str(key): _plain(value) for key, value in row.items()}
            yield clean_rows([plain], schema, null_keys)[0] if is_arrow else plain


def _frame_rows(frame: Any, source: str, null_keys: Counter[str]) -> Iterator[Row]:
    """Yield the rows of a frame; objects in arrays came from Arrow, those in lists did not."""
    names = [str(name) for name in frame.columns]
    check_columns(names, source)
    columns = []
    for number in range(len(names)):
        column = frame.iloc[:, number]
        if hasattr(column.dtype, "pyarrow_dtype"):  # an array would turn whole numbers to floats
            import pyarrow as pa  # type: ignore[import-untyped]

            table = pa.table({names[number]: pa.array(column)})
            columns.append([row[names[number]] for row in arrow_rows(table, null_keys)])
            continue
        cells = zip(column.astype(object), column.isna(), strict=True)
        values = [None if gone else value for value, gone in cells]
        plain = list(map(_plain, values))
        if column.dtype == object and any(map(_has_array, values)):
            plain = [
                clean_value(value, names[number], null_keys) for value in _with_integers(plain)
            ]
        columns.append(plain)
    for row in zip(*columns, strict=True):
        yield dict(zip(names, row, strict=True))


def _with_integers(values: list[Any]) -> list[Any]:
    """Return the cells of a column with the integers that pandas converted to floats.

    Where an integer is null in some objects of an Arrow column, the arrays of pandas have floats.
    """
    nulls: set[str] = set()
    others: set[str] = set()

    def look(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                look(item, f"{path}.{key}")
        elif isinstance(value, list):
            for item in value:
                look(item, path)
        elif value is None or value != value:
            nulls.add(path)
        elif not isinstance(value, float) or not value.is_integer():
            others.add(path)

    def restore(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: restore(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [restore(item, path) for item in value]
        if isinstance(value, float) and value != value:
            return None
        return int(value) if isinstance(value, float) and path in whole else value

    look(values, "")
    whole = nulls - others
    return [restore(value, "") for value in values]


def _has_array(value: Any) -> bool:
    """Whether a cell is an array, or an object with one: as pandas reads lists from Parquet."""
    if isinstance(value, Mapping):
        return any(map(_has_array, value.values()))
    return type(value).__module__ == "numpy" and hasattr(value, "__len__")


def _check_rows(rows: Any, source: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of an iterable, each of which must be a mapping."""
    if isinstance(rows, Mapping):
        raise InputError(
            f"{source}: the rows in memory are a dict of {listing(map(repr, rows))}. Expected the "
            "rows of one split, such as rows['test']."
        )
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
        plain = value.tolist()
        return _plain(plain) if isinstance(plain, list) else plain
    return value
