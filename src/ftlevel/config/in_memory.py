"""Datasets passed as Python objects; configurations show a name instead of the rows."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import WrapValidator

IN_MEMORY = "in memory"
"""Name of rows that are not in a file."""


class InMemoryDataset(str):
    """Name of an in-memory dataset, with its `rows`; printed and compared by name alone.

    `rows` is a DataFrame, a `datasets.Dataset` or `DatasetDict`, or an iterable of mappings.
    """

    rows: Any
    said: str

    def __new__(cls, rows: Any) -> InMemoryDataset:
        """Create the name of `rows`."""
        made = super().__new__(cls, IN_MEMORY)
        made.rows, made.said = rows, "dataset"
        return made

    def __getnewargs__(self) -> Any:
        return (self.rows,)


def wrap_rows(value: Any) -> Any:
    """Return rows as `InMemoryDataset`, a path as text, and any other value unchanged."""
    if isinstance(value, os.PathLike):  # arguments are not validated yet
        return os.fspath(value)
    is_frame = hasattr(value, "columns") and hasattr(value, "to_dict")
    if isinstance(value, str | bytes) or not (hasattr(value, "__iter__") or is_frame):
        return value
    return InMemoryDataset(value)


def _accept(value: Any, validate: Any) -> Any:
    named = wrap_rows(value)
    return named if isinstance(named, InMemoryDataset) else validate(named)


DatasetName = Annotated[str, WrapValidator(_accept)]
"""Name of a dataset, or its rows."""
