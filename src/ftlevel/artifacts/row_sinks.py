"""Where rows with their answers go: what a file, a pipe and a list have in common.

A value as JSON or as the cell of a table.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

from ftlevel.errors import listing


def to_json(row: Mapping[str, Any]) -> str:
    """Return a row as a line of JSON; what JSON has no word for is text, NaN and infinity null."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text)
    except ValueError:
        return json.dumps(_finite(row), ensure_ascii=False, default=_as_text)


def to_cell(value: Any) -> str:
    """Return a value as the cell of a table: nothing for null, JSON for lists and objects."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict | tuple):
        return json.dumps(value, ensure_ascii=False, default=_as_text)
    return repr(value) if isinstance(value, int | float) else _as_text(value)


def _as_text(value: Any) -> str:
    """Return a date, a decimal or bytes as text."""
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
    """The columns of a file.

    Attributes:
        names: of the rows that were read, in order.
        answers: of what is added to them: name → what it holds, as `ftlevel.tasks.base.Column`.
        schema: Arrow's, of `names`, where the source declares their types; else None.
    """

    names: Sequence[str]
    answers: Mapping[str, str] = field(default_factory=dict)
    schema: Any = None


class RowSink(Protocol):
    """Where rows with their answers go.

    Attributes:
        is_table: whether every row has the same columns.
    """

    is_table: ClassVar[bool]

    def write(self, rows: Sequence[Row]) -> None:
        """Take rows, each with what is added to it."""

    def finish(self) -> None:
        """There are no more."""

    def close(self) -> None:
        """Let go of what is held."""


class LineStream:
    """Rows as lines of JSON, for a pipe.

    Args:
        stream: takes them.
    """

    is_table: ClassVar[bool] = False

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, rows: Sequence[Row]) -> None:
        """Write a line a row."""
        self._stream.write("".join(to_json(row) + "\n" for row in rows))
        self._stream.flush()

    def finish(self) -> None:
        """Do nothing: the stream is another's."""

    close = finish


class RowList:
    """Rows in memory.

    Attributes:
        rows: all that came.
    """

    is_table: ClassVar[bool] = False

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, rows: Sequence[Row]) -> None:
        """Keep rows."""
        self.rows += [dict(row) for row in rows]

    def finish(self) -> None:
        """Do nothing."""

    close = finish


class RowFile(ABC):
    """A file of rows that is being written.

    Args:
        path: where it will be.
        columns: what its rows have.

    Attributes:
        is_table: whether every row has the same columns.
    """

    is_table: ClassVar[bool] = True

    def __init__(self, path: Path, columns: RowColumns) -> None:
        self.path = path
        self.columns = columns
        self.partial = partial_of(path)

    # ---- what is there already

    @property
    def existing(self) -> Path | None:
        """What was written before: the part of a process that was stopped, or the whole file."""
        return next((place for place in (self.partial, self.path) if place.is_file()), None)

    @abstractmethod
    def read_back(self) -> Iterator[Any]:
        """Yield each whole row that was written before, in the form of `as_written`.

        Raises:
            InputError: it has other columns.
        """

    @abstractmethod
    def as_written(self, row: Row) -> Any:
        """Return what `read_back` gives of a row, without what is added to it."""

    # ---- writing

    @abstractmethod
    def open(self, keep: int) -> None:
        """Begin to write behind the first `keep` rows that are there, which `read_back` gave."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Write rows, each with what is added to it, to the disk."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file, which can be gone on with."""

    def discard(self) -> None:
        """Let go of the file, in which there is no row."""
        self.close()
        self.partial.unlink(missing_ok=True)

    def finish(self) -> None:
        """Put the file in place."""
        self.close()
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
        self.partial.replace(self.path)


def partial_of(path: Path) -> Path:
    """Return where the rows of `path` lie until it is whole."""
    return path.with_name(f"{path.name}.partial")


def describe_columns(path: Path, found: Sequence[str], expected: Sequence[str] = ()) -> str:
    """Return the message for a file that was begun with other columns than those `expected`.

    Args:
        path: the file.
        found: its columns; where nothing is `expected`, those that a row of it lacks.
        expected: what they would be now.
    """
    if not expected:
        return f"--resume: {path} has rows without {listing(found)}. Name another --output."
    return (
        f"--resume: {path} has the columns {listing(found)}, and there would be "
        f"{listing(expected)}. Give the flags that it was begun with, or name another --output."
    )
