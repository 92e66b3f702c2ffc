"""Files of rows that a command writes: CSV, TSV, JSON Lines and Parquet, by the suffix of the name.

Rows are appended to a file of the same name with `.partial` behind it, which becomes the named one
at the end: it is absent or whole, and what a process that was stopped had written can be gone on
with. Numbers, dates and lists of a table's cells are written as text that says the same.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

from ftlevel.artifacts.files import check_file_free
from ftlevel.errors import ConfigError, InputError, listing

Row = Mapping[str, Any]
_LONGEST = min(sys.maxsize, 2**31 - 1)  # cells of any length are read back
_ROW_GROUP = 16_384  # rows of a Parquet row group, about


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

    def finish(self) -> None:
        """Put the file in place."""
        self.close()
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
        self.partial.replace(self.path)


class _TextFile(RowFile):
    """A file of text, of which the bytes behind the last whole row are cut off."""

    def __init__(self, path: Path, columns: RowColumns) -> None:
        super().__init__(path, columns)
        self._file: IO[str] | None = None
        self._ends: int = 0  # byte behind the last row that was read back, or behind the header

    def open(self, keep: int) -> None:
        """Begin to write behind the first `keep` rows."""
        there = self.existing
        if there is None or not self._ends:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mode = "x" if there is None else "w"
            self._file = self.partial.open(mode, encoding="utf-8", newline="")
            self._begin()
            return
        if there == self.path:
            self.path.replace(self.partial)
        os.truncate(self.partial, self._ends)
        self._file = self.partial.open("a", encoding="utf-8", newline="")

    def _begin(self) -> None:
        """Write what comes before the first row."""

    def _put(self, text: str) -> None:
        if self._file is None:
            raise RuntimeError("the file is not open")
        self._file.write(text)
        self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class JsonLinesFile(_TextFile):
    """An object a line."""

    is_table = False

    def read_back(self) -> Iterator[Any]:
        """Yield the objects of whole lines, without what was added."""
        there = self.existing
        if there is None:
            return
        with there.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                except ValueError:
                    return
                missing = [name for name in self.columns.answers if name not in row]
                if missing:
                    raise InputError(_other_columns(there, missing))
                self._ends += len(line)
                yield {k: v for k, v in row.items() if k not in self.columns.answers}

    def as_written(self, row: Row) -> Any:
        """Return the row as JSON gives it back."""
        return json.loads(to_json(row))

    def write(self, rows: Sequence[Row]) -> None:
        """Write a line a row."""
        self._put("".join(to_json(row) + "\n" for row in rows))


class CommaSeparatedFile(_TextFile):
    """Cells between commas, below a header."""

    separator: ClassVar[str] = ","

    @property
    def _header(self) -> list[str]:
        return [*self.columns.names, *self.columns.answers]

    def _begin(self) -> None:
        self._put(self._lines([self._header]))

    def read_back(self) -> Iterator[Any]:
        """Yield the cells of whole rows, without what was added."""
        there = self.existing
        if there is None:
            return
        width, limit = len(self.columns.names), csv.field_size_limit(_LONGEST)
        with there.open("rb") as file:
            taken = _Counted(file)
            cells = csv.reader(taken, delimiter=self.separator, strict=True)
            try:
                header = next(cells, None)
                if header is None or not taken.is_whole:
                    return
                if header != self._header:
                    raise InputError(_other_columns(there, header, self._header))
                self._ends = taken.bytes
                for row in cells:
                    if not taken.is_whole or len(row) != len(header):
                        return
                    self._ends = taken.bytes
                    yield row[:width]
            except (csv.Error, UnicodeDecodeError):
                return  # a row that was cut off inside quotes, or inside a character
            finally:
                csv.field_size_limit(limit)

    def as_written(self, row: Row) -> Any:
        """Return the cells of a row."""
        return [to_cell(row.get(name)) for name in self.columns.names]

    def write(self, rows: Sequence[Row]) -> None:
        """Write rows of cells."""
        self._put(self._lines([to_cell(row.get(name)) for name in self._header] for row in rows))

    def _lines(self, rows: Iterable[Sequence[str]]) -> str:
        text = io.StringIO()
        # With \r\n as its end of a line the module quotes cells with either of the two.
        writer = csv.writer(text, delimiter=self.separator, lineterminator="\r\n")
        lines = []
        for row in rows:
            text.seek(0)
            text.truncate()
            writer.writerow(row)
            lines.append(text.getvalue()[:-2] + "\n")
        return "".join(lines)


class TabSeparatedFile(CommaSeparatedFile):
    """Cells between tabs."""

    separator = "\t"


class _Counted:
    """The lines of a file, decoded, and how many bytes were taken."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.bytes = 0
        self.is_whole = False

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.bytes += len(line)
            self.is_whole = line.endswith(b"\n")
            yield line.decode("utf-8")


class ParquetFile(RowFile):
    """Parquet; until it is whole its rows lie in a stream of Arrow's, which can be gone on with."""

    def __init__(self, path: Path, columns: RowColumns) -> None:
        super().__init__(path, columns)
        self._schema: Any = None
        self._writer: Any = None
        self._sink: Any = None
        if columns.schema is not None:
            self._schema = self._with_answers(columns.schema)

    def _with_answers(self, schema: Any) -> Any:
        for name, kind in self.columns.answers.items():
            schema = schema.append(_arrow_field(name, kind))
        return schema

    def read_back(self) -> Iterator[Any]:
        """Yield the values of whole batches, without what was added."""
        there = self.existing
        names = self.columns.names
        for batch in _batches(there) if there is not None else ():
            if there is not None and batch.schema.names != [*names, *self.columns.answers]:
                raise InputError(
                    _other_columns(there, batch.schema.names, [*names, *self.columns.answers])
                )
            self._schema = batch.schema
            for row in batch.select(names).to_pylist():
                yield self.as_written(row)

    def as_written(self, row: Row) -> Any:
        """Return the values of a row as text, in which NaN is what it is."""
        return [repr(row.get(name)) for name in self.columns.names]

    def open(self, keep: int) -> None:
        """Begin a new stream with the first `keep` rows in it."""
        there = self.existing
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.partial.name}.new")
        self._sink = new.open("wb")
        for batch in _batches(there) if there is not None and keep else ():
            taken = batch.slice(0, keep)
            keep -= taken.num_rows
            self._append(taken)
        new.replace(self.partial)

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows to the stream.

        Raises:
            InputError: a value is not of the type that the column has in earlier rows.
        """
        import pyarrow as pa  # type: ignore[import-untyped]

        try:
            if self._schema is None:
                names = self.columns.names
                own = pa.Table.from_pylist([{n: r.get(n) for n in names} for r in rows]).schema
                for at, column in enumerate(own):
                    if pa.types.is_null(column.type):
                        own = own.set(at, pa.field(column.name, pa.string()))
                self._schema = self._with_answers(own)
            batch = pa.RecordBatch.from_pylist(list(rows), schema=self._schema)
        except (pa.ArrowException, OverflowError) as error:
            first = str(error).splitlines()[0].rstrip(".")
            raise InputError(
                f"{self.path}: the rows have no one type a column ({first}). Write .jsonl, which "
                "needs none."
            ) from None
        self._append(batch)

    def _append(self, batch: Any) -> None:
        import pyarrow as pa

        if self._writer is None:
            self._writer = pa.ipc.new_stream(self._sink, batch.schema)
        self._writer.write_batch(batch)
        self._sink.flush()

    def close(self) -> None:
        """Let go of the stream."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def finish(self) -> None:
        """Write the stream as Parquet, and put it in place."""
        import pyarrow as pa
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        self.close()
        made = self.path.with_name(f".{self.path.name}.made")
        with pq.ParquetWriter(made, self._schema) as writer:
            waiting: list[Any] = []
            for batch in _batches(self.partial):
                waiting.append(batch)
                if sum(b.num_rows for b in waiting) >= _ROW_GROUP:
                    writer.write_table(pa.Table.from_batches(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting))
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(self.path)
        self.partial.unlink()


def _batches(path: Path) -> Iterator[Any]:
    """Yield the whole batches of Parquet, or of a stream of Arrow's that may be cut off."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            yield from pq.ParquetFile(path).iter_batches(_ROW_GROUP)
            return
        file.seek(0)
        try:
            yield from pa.ipc.open_stream(file)
        except (pa.ArrowException, OSError):
            return


_ANSWER = {"answer": "string", "probability": "float64"}


def _arrow_field(name: str, kind: str) -> Any:
    import pyarrow as pa

    ranking = pa.list_(pa.struct([(key, pa.type_for_alias(t)) for key, t in _ANSWER.items()]))
    types = {
        "text": pa.string(), "texts": pa.list_(pa.string()), "number": pa.float64(),
        "numbers": pa.list_(pa.float64()), "whole": pa.int64(), "ranking": ranking,
        "rankings": pa.list_(ranking),
    }  # fmt: skip
    return pa.field(name, types[kind])


ROW_FILES: dict[str, type[RowFile]] = {
    ".csv": CommaSeparatedFile,
    ".tsv": TabSeparatedFile,
    ".jsonl": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".parquet": ParquetFile,
}
"""Every format that is written, by the suffix of the file's name."""


def partial_of(path: Path) -> Path:
    """Return where the rows of `path` lie until it is whole."""
    return path.with_name(f"{path.name}.partial")


def row_file_type(flag: str, path: Path) -> type[RowFile]:
    """Return the format of `path`.

    Raises:
        ConfigError: its suffix is of none.
    """
    found = ROW_FILES.get(path.suffix.lower())
    if found is None:
        raise ConfigError(
            f"{flag} {path}: cannot write {path.suffix or 'a file without extension'!r}. "
            f"Formats: {listing(ROW_FILES)}. Name the file by one of them."
        )
    return found


def check_row_file(flag: str, path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a file of rows that cannot be written, or that is there and not to be gone on with.

    Raises:
        ConfigError: naming the `flag`.
    """
    row_file_type(flag, path)
    check_file_free(flag, path, overwrite=overwrite or resume)
    partial = partial_of(path)
    if partial.exists() and not (resume or overwrite):
        raise ConfigError(
            f"{flag} {path}: {partial.name} holds rows of a command that was stopped. Go on with "
            "it by --resume, or delete it."
        )


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows`, whose keys may differ, as one file, absent or whole."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = row_file_type("", path)(path, RowColumns(names))
    file.open(0)
    file.write(rows)
    file.finish()


def to_json(row: Row) -> str:
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


def _other_columns(path: Path, found: Sequence[str], expected: Sequence[str] = ()) -> str:
    if not expected:
        return f"--resume: {path} has rows without {listing(found)}. Name another --output."
    return (
        f"--resume: {path} has the columns {listing(found)}, and there would be "
        f"{listing(expected)}. Give the flags that it was begun with, or name another --output."
    )
