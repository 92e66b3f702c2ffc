"""Rows that a program hands over: in a configuration a name stands for them, which shows none."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import WrapValidator

IN_MEMORY = "in memory"
"""What rows are called that no file holds."""


class RowsInMemory(str):
    """The name of rows in memory, with the rows behind it.

    A configuration is printed, written and compared: there it is the name alone.

    Attributes:
        rows: a DataFrame, a `datasets.Dataset` or DatasetDict, or what yields mappings.
        said: what messages about a row begin with.
    """

    rows: Any
    said: str

    def __new__(cls, rows: Any) -> RowsInMemory:
        """Name `rows`."""
        made = super().__new__(cls, IN_MEMORY)
        made.rows, made.said = rows, "dataset"
        return made

    def __getnewargs__(self) -> Any:
        return (self.rows,)


def name_rows(value: Any) -> Any:
    """Return `value` as a configuration holds it: rows by a name, a path as text, else as it is."""
    if isinstance(value, os.PathLike):  # of an argument, that is no field yet
        return os.fspath(value)
    is_frame = hasattr(value, "columns") and hasattr(value, "to_dict")
    if isinstance(value, str | bytes) or not (hasattr(value, "__iter__") or is_frame):
        return value
    return RowsInMemory(value)


def _accept(value: Any, validate: Any) -> Any:
    named = name_rows(value)
    return named if isinstance(named, RowsInMemory) else validate(named)


DatasetName = Annotated[str, WrapValidator(_accept)]
"""A name of a data set; in Python also its rows."""
