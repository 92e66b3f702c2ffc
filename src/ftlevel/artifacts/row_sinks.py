"""Sinks for rows with their answers (file, pipe or list), and the encoding of their values."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

from ftlevel.errors import join_names


def to_json(row: Mapping[str, Any]) -> str:
    """Returns a row as a line of JSON; NaN and infinity become null, other types text.

    The values of an array have nine digits, which determine a float32.
    """
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text)
    except ValueError:
        return json.dumps(_finite(row), ensure_ascii=False, default=_as_text)


def to_cell(value: Any) -> str:
    """Returns a value as the cell of a table: empty for null, JSON for lists and objects."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict | tuple) or hasattr(value, "tolist"):
        return json.dumps(value, ensure_ascii=False, default=_as_text)
    return repr(value) if isinstance(value, int | float) else _as_text(value)


def _as_text(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return [float(f"{number:.9g}") for number in value.tolist()]
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowColumns:
    """Columns of a row file: `names` of the input, and added `answers` → type as in `Column`.

    `schema` is the Arrow schema of `names` if the source declares one.
    """

    names: Sequence[str]
    answers: Mapping[str, str] = field(default_factory=dict)
    schema: Any = None


class RowSink(Protocol):
    """Interface of a sink for rows; `is_table` is true if every row has the same columns."""

    is_table: ClassVar[bool]

    def write(self, rows: Sequence[Row]) -> None:
        """Write rows, each with the answer columns."""

    def finish(self) -> None:
        """Complete the output."""

    def close(self) -> None:
        """Release resources."""


class LineStream:
    """Write rows as lines of JSON to a stream, such as a pipe."""

    is_table: ClassVar[bool] = False

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, rows: Sequence[Row]) -> None:
        """Write one line per row and flush."""
        self._stream.write("".join(to_json(row) + "\n" for row in rows))
        self._stream.flush()

    def finish(self) -> None:
        """Do nothing; the caller owns the stream."""

    close = finish


class RowList:
    """Collect rows in memory."""

    is_table: ClassVar[bool] = False

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, rows: Sequence[Row]) -> None:
        """Append copies of the rows."""
        self.rows += [dict(row) for row in rows]

    def finish(self) -> None:
        """Do nothing."""

    close = finish


class RowFile(ABC):
    """A file of rows, written to a partial file until it is complete."""

    is_table: ClassVar[bool] = True

    def __init__(self, path: Path, columns: RowColumns) -> None:
        self.path = path
        self.columns = columns
        self.partial = partial_of(path)

    # ---- existing rows

    @property
    def existing(self) -> Path | None:
        """The partial file of an interrupted process, or the complete file, if any."""
        return next((path for path in (self.partial, self.path) if path.is_file()), None)

    @abstractmethod
    def read_back(self) -> Iterator[Any]:
        """Yields each complete row already in the file; raises InputError if its columns differ."""

    @abstractmethod
    def as_written(self, row: Row) -> Any:
        """Returns the form in which `read_back` yields a row, without the answer columns."""

    # ---- writing

    @abstractmethod
    def open(self, keep: int) -> None:
        """Open the file for appending after the first `keep` rows from `read_back`."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Write rows with their answer columns to disk."""

    @abstractmethod
    def close(self) -> None:
        """Close the partial file, which can be resumed."""

    def discard(self) -> None:
        """Close and delete a partial file without rows."""
        self.close()
        self.partial.unlink(missing_ok=True)

    def finish(self) -> None:
        """Flush the file and rename it to the path."""
        self.close()
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
        self.partial.replace(self.path)


def partial_of(path: Path) -> Path:
    """Returns the path of the partial file of `path`."""
    return path.with_name(f"{path.name}.partial")


def describe_columns(path: Path, columns: Sequence[str], expected: Sequence[str] = ()) -> str:
    """Returns the message for other columns; without `expected`, `columns` are missing."""
    if not expected:
        return f"--resume: {path} has rows without {join_names(columns)}. Choose another --output."
    return (
        f"--resume: {path} has the columns {join_names(columns)}, and there would be "
        f"{join_names(expected)}. Use the flags of the interrupted command, or choose another "
        f"--output."
    )
