"""Write predicted rows to a file, pipe or list."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import IO, Any, ClassVar

from ftlevel.artifacts.files import flush
from ftlevel.errors import join_names
from ftlevel.safe_io import escape_json


def bin_lengths(
    ordered: Sequence[tuple[int, float]], num_bins: int
) -> list[tuple[int, int, int, float]]:
    """Returns (minimum, maximum, count, mean value) per bin; [] for fewer lengths than bins."""
    if len({length for length, _ in ordered}) < num_bins:
        return []
    bins = [
        ordered[len(ordered) * at // num_bins : len(ordered) * (at + 1) // num_bins]
        for at in range(num_bins)
    ]
    return [
        (band[0][0], band[-1][0], len(band), fmean(value for _, value in band)) for band in bins
    ]


def to_json(row: Mapping[str, Any]) -> str:
    """Returns a row as JSON; NaN and infinity become null, arrays have nine digits (a float32)."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text)
    except ValueError:
        return json.dumps(_replace_nonfinite(row), ensure_ascii=False, default=_as_text)


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
        plain = value.tolist()  # a scalar of NumPy gives a number
        return [float(f"{number:.9g}") for number in plain] if isinstance(plain, list) else plain
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowColumns:
    """Names and types of the columns of a row file.

    Attributes:
        answers: name of a predicted column → type of its values.
        schema: Arrow schema of the input columns `names`, if the source declares one.
    """

    names: Sequence[str]
    answers: Mapping[str, str] = field(default_factory=dict)
    schema: Any = None


class RowSink(ABC):
    """Base class of row outputs; `is_table` is true if all rows must have the same columns."""

    is_table: ClassVar[bool] = False

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Write rows, each with its predicted columns."""

    def finalize(self) -> None:  # noqa: B027 - the default has no resources
        """Complete the output."""

    def close(self) -> None:  # noqa: B027 - the default has no resources
        """Release resources."""


class LineStream(RowSink):
    """Writes rows as lines of JSON to a stream, such as a pipe, which the caller owns."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, rows: Sequence[Row]) -> None:
        """Write one line per row and flush."""
        self._stream.write("".join(escape_json(to_json(row)) + "\n" for row in rows))
        self._stream.flush()


class RowList(RowSink):
    """Collects rows in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, rows: Sequence[Row]) -> None:
        """Append copies of the rows."""
        self.rows += [dict(row) for row in rows]


class RowFile(RowSink):
    """Base class of row files; rows are in a partial file until it is complete."""

    is_table: ClassVar[bool] = True

    def __init__(self, path: Path, columns: RowColumns) -> None:
        self.path = path
        self.columns = columns
        self.partial = partial_of(path)
        self._file: Any = None

    # ---- existing rows

    @property
    def existing(self) -> Path | None:
        """The partial file of an interrupted process, else the complete file, else None."""
        return next((path for path in (self.partial, self.path) if path.is_file()), None)

    @abstractmethod
    def load_previous(self) -> Iterator[Any]:
        """Yields each complete row already in the file; raises InputError if its columns differ."""

    @abstractmethod
    def normalize(self, row: Row) -> Any:
        """Returns a row without predicted columns, in the format of `load_previous`."""

    # ---- writing

    @abstractmethod
    def open(self, keep: int) -> None:
        """Open the file for appending; the first `keep` rows from `load_previous` stay."""

    def close(self) -> None:
        """Close the partial file, which can be resumed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Close and delete a partial file without rows."""
        self.close()
        self.partial.unlink(missing_ok=True)

    def finalize(self) -> None:
        """Flush the partial file and rename it to `path`."""
        self.close()
        flush(self.partial)
        self.partial.replace(self.path)


def partial_of(path: Path) -> Path:
    """Returns the path to which the rows of file `path` are written until it is complete."""
    return path.with_name(f"{path.name}.partial")


def format_columns_error(path: Path, names: Sequence[str], expected: Sequence[str] = ()) -> str:
    """Returns the error for columns `names` other than `expected`; without it, for missing ones."""
    if not expected:
        return f"--resume: {path} has rows without {join_names(names)}. Choose another --output."
    return (
        f"--resume: {path} has the columns {join_names(names)}, and there would be "
        f"{join_names(expected)}. Use the flags of the interrupted command, or choose another "
        f"--output."
    )
