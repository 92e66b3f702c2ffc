"""JSON Lines, CSV and TSV, appended to; what was cut off in the middle of a row is cut off.

Parquet, whose rows lie in a stream of Arrow's until it is whole.

A name to the format of its file, by the suffix.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

from ftlevel.artifacts.files import check_file_free
from ftlevel.artifacts.row_sinks import (
    Row,
    RowColumns,
    RowFile,
    describe_columns,
    partial_of,
    to_cell,
    to_json,
)
from ftlevel.errors import ConfigError, InputError, listing

_LONGEST = min(sys.maxsize, 2**31 - 1)  # cells of any length are read back


class _TextFile(RowFile):
    """A file of text, of which the bytes behind the last whole row are cut off."""

    def __init__(self, path: Path, columns: RowColumns) -> None:
        super().__init__(path, columns)
        self._file: IO[str] | None = None
        self._ends: int = 0  # byte behind the last row that was read back, or behind the header

    def open(self, keep: int) -> None:  # noqa: ARG002 - `read_back` has seen where they end
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
                    raise InputError(describe_columns(there, missing))
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
                    raise InputError(describe_columns(there, header, self._header))
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


_ROW_GROUP = 16_384  # rows of a Parquet row group, about


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
                    describe_columns(there, batch.schema.names, [*names, *self.columns.answers])
                )
            self._schema = batch.schema
            for row in batch.select(names).to_pylist(maps_as_pydicts="lossy"):
                yield self.as_written(row)

    def as_written(self, row: Row) -> Any:
        """Return the values of a row as text, in which NaN is what it is.

        A key that is null and one that is missing are the same in Parquet.
        """
        return [repr(_without_null_keys(row.get(name))) for name in self.columns.names]

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


def _without_null_keys(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_null_keys(item) for item in value]
    if isinstance(value, dict):
        pairs = ((key, _without_null_keys(item)) for key, item in value.items())
        return {key: item for key, item in sorted(pairs) if item is not None}
    return value


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
