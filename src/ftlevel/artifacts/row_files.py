"""Row files in JSON Lines, CSV, TSV and Parquet that can be resumed after an interruption.

Text formats are appended to after the last complete row. Parquet rows are first written to an Arrow
IPC stream.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

from ftlevel.artifacts.files import check_output_file, flush, long_cells
from ftlevel.artifacts.row_sinks import (
    Row,
    RowColumns,
    RowFile,
    format_columns_error,
    partial_of,
    to_cell,
    to_json,
)
from ftlevel.errors import ConfigError, InputError, join_names
from ftlevel.safe_io import open_existing, open_new


class _TextFile(RowFile):
    """Base class of row files in text; on resume, an incomplete last row is cut off."""

    def __init__(self, path: Path, columns: RowColumns) -> None:
        super().__init__(path, columns)
        self._end_offset: int = 0  # offset after the last complete row or the header

    def open(self, keep: int) -> None:  # noqa: ARG002 - `load_previous` sets `_end_offset`
        """Open the file for appending after the first `keep` rows."""
        previous = self.existing
        if previous is None or not self._end_offset:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_new(self.partial, newline="")
            self._add_header()
            return
        if previous == self.path:
            self.path.replace(self.partial)
        self._file = open_existing(self.partial, newline="")
        self._file.truncate(self._end_offset)

    def _add_header(self) -> None:
        """Write the text before the first row, such as column names; nothing by default."""

    def _add_text(self, text: str) -> None:
        if self._file is None:
            raise RuntimeError("the file is not open")
        self._file.write(text)
        self._file.flush()


class JsonLinesFile(_TextFile):
    """Row file in JSON Lines: one JSON object per line."""

    is_table = False

    def load_previous(self) -> Iterator[Any]:
        """Yields the JSON object of each complete line, without the predicted columns."""
        previous = self.existing
        if previous is None:
            return
        with previous.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                except ValueError:
                    return
                missing = [name for name in self.columns.answers if name not in row]
                if missing:
                    raise InputError(format_columns_error(previous, missing))
                self._end_offset += len(line)
                yield {k: v for k, v in row.items() if k not in self.columns.answers}

    def normalize(self, row: Row) -> Any:
        """Returns the row after a round trip through JSON, as `load_previous` yields it."""
        return json.loads(to_json(row))

    def write(self, rows: Sequence[Row]) -> None:
        """Append one line per row."""
        self._add_text("".join(to_json(row) + "\n" for row in rows))


class CommaSeparatedFile(_TextFile):
    """Row file in CSV: comma-separated cells, with column names in the first line."""

    separator: ClassVar[str] = ","

    @property
    def _header(self) -> list[str]:
        return [*self.columns.names, *self.columns.answers]

    def _add_header(self) -> None:
        self._add_text(self._lines([self._header]))

    def load_previous(self) -> Iterator[Any]:
        """Yields the list of cells of each complete row, without the predicted columns."""
        previous = self.existing
        if previous is None:
            return
        width = len(self.columns.names)
        with previous.open("rb") as file, long_cells():
            lines = _DecodedFile(file)
            cells = csv.reader(lines, delimiter=self.separator, strict=True)
            try:
                columns = next(cells, None)
                if columns is None or not lines.has_newline:
                    return
                if columns != self._header:
                    raise InputError(format_columns_error(previous, columns, self._header))
                self._end_offset = lines.bytes
                for row in cells:
                    if not lines.has_newline or len(row) != len(columns):
                        return
                    self._end_offset = lines.bytes
                    yield row[:width]
            except (csv.Error, UnicodeDecodeError):
                return  # truncated inside quotes or a character

    def normalize(self, row: Row) -> Any:
        """Returns the cells of a row, without the predicted columns."""
        return [to_cell(row.get(name)) for name in self.columns.names]

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows of cells."""
        self._add_text(
            self._lines([to_cell(row.get(name)) for name in self._header] for row in rows)
        )

    def _lines(self, rows: Iterable[Sequence[str]]) -> str:
        text = io.StringIO()
        # With the terminator \r\n, csv quotes cells that contain either character.
        writer = csv.writer(text, delimiter=self.separator, lineterminator="\r\n")
        lines = []
        for row in rows:
            text.seek(0)
            text.truncate()
            writer.writerow(row)
            lines.append(text.getvalue()[:-2] + "\n")
        return "".join(lines)


class TabSeparatedFile(CommaSeparatedFile):
    """Row file in TSV: tab-separated cells, with column names in the first line."""

    separator = "\t"


class _DecodedFile:
    """Iterable of a file's decoded lines; `bytes` is the number of bytes read so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.bytes = 0
        self.has_newline = False

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.bytes += len(line)
            self.has_newline = line.endswith(b"\n")
            yield line.decode("utf-8")


_ROW_GROUP = 16_384  # approximate rows per Parquet row group


class ParquetFile(RowFile):
    """Row file in Parquet; until it is complete, its rows are in a resumable Arrow stream."""

    def __init__(self, path: Path, columns: RowColumns) -> None:
        super().__init__(path, columns)
        self._schema: Any = None
        self._writer: Any = None
        if columns.schema is not None and "embedding" not in columns.answers.values():
            self._schema = self._add_predicted_columns(columns.schema, ())

    def _add_predicted_columns(self, schema: Any, rows: Sequence[Row]) -> Any:
        for name, column_type in self.columns.answers.items():
            values = [row[name] for row in rows if row.get(name) is not None]
            width = len(values[0]) if column_type == "embedding" and values else -1
            schema = schema.append(_arrow_field(name, column_type, width))
        return schema

    def load_previous(self) -> Iterator[Any]:
        """Yields each row of the complete batches, as `normalize` returns it."""
        previous, names = self.existing or self.path, self.columns.names
        expected = [*names, *self.columns.answers]
        for batch in _batches(previous):
            if batch.schema.names != expected:
                raise InputError(format_columns_error(previous, batch.schema.names, expected))
            self._schema = batch.schema
            for row in batch.select(names).to_pylist(maps_as_pydicts="lossy"):
                yield self.normalize(row)

    def normalize(self, row: Row) -> Any:
        """Returns the input values as text, so that NaN equals itself; null keys are omitted."""
        return [repr(_drop_null_keys(row.get(name))) for name in self.columns.names]

    def open(self, keep: int) -> None:
        """Start a new stream that contains the first `keep` rows."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.partial.name}.new")
        self._file = open_new(new, "wb")
        for batch in _batches(self.existing or self.path) if keep else ():
            chunk = batch.slice(0, keep)
            keep -= chunk.num_rows
            self._append(chunk)
        new.replace(self.partial)

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows; raise InputError if a value does not have the type of its column."""
        import pyarrow as pa  # type: ignore[import-untyped]

        try:
            if self._schema is None:
                self._schema = self._add_predicted_columns(
                    self.columns.schema or self._infer_schema(rows), rows
                )
            batch = pa.RecordBatch.from_pylist(list(rows), schema=self._schema)
        except (pa.ArrowException, OverflowError) as error:
            first = str(error).splitlines()[0].rstrip(".")
            raise InputError(
                f"{self.path}: values of one column differ in type ({first}). Write .jsonl, which "
                "allows that."
            ) from None
        self._append(batch)

    def _infer_schema(self, rows: Sequence[Row]) -> Any:
        import pyarrow as pa

        names = self.columns.names
        schema = pa.Table.from_pylist([{n: r.get(n) for n in names} for r in rows]).schema
        for at, column in enumerate(schema):
            if pa.types.is_null(column.type):
                schema = schema.set(at, pa.field(column.name, pa.string()))
        return schema

    def _append(self, batch: Any) -> None:
        import pyarrow as pa

        if self._writer is None:
            self._writer = pa.ipc.new_stream(self._file, batch.schema)
        self._writer.write_batch(batch)
        self._file.flush()

    def close(self) -> None:
        """Close the stream."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        super().close()

    def finalize(self) -> None:
        """Convert the stream to the Parquet file at `path`."""
        import pyarrow as pa
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        self.close()
        complete = self.path.with_name(f".{self.path.name}.made")
        with open_new(complete, "wb") as file, pq.ParquetWriter(file, self._schema) as writer:
            pending: list[Any] = []
            for batch in _batches(self.partial):
                pending.append(batch)
                if sum(b.num_rows for b in pending) >= _ROW_GROUP:
                    writer.write_table(pa.Table.from_batches(pending))
                    pending = []
            if pending:
                writer.write_table(pa.Table.from_batches(pending))
        flush(complete)
        complete.replace(self.path)
        self.partial.unlink()


def _drop_null_keys(value: Any) -> Any:
    if isinstance(value, list):
        return [_drop_null_keys(item) for item in value]
    if isinstance(value, dict):
        pairs = ((key, _drop_null_keys(item)) for key, item in value.items())
        return {key: item for key, item in sorted(pairs) if item is not None}
    return value


def _batches(path: Path) -> Iterator[Any]:
    """Yields the Arrow batches in a Parquet file or in an Arrow stream, which may be truncated."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            yield from pq.ParquetFile(path).iter_batches(_ROW_GROUP)
            return
        file.seek(0)
        try:
            yield from pa.ipc.open_stream(file)
        except (pa.ArrowException, OSError):
            return


_RANKING_TYPES = {"answer": "string", "probability": "float64"}


def _arrow_field(name: str, column_type: str, width: int) -> Any:
    """Returns the Arrow field of a column; `width`: dimensions of embeddings, -1 if unknown."""
    import pyarrow as pa

    ranking = pa.list_(
        pa.struct([(key, pa.type_for_alias(t)) for key, t in _RANKING_TYPES.items()])
    )
    types = {
        "text": pa.string(),
        "texts": pa.list_(pa.string()),
        "number": pa.float64(),
        "numbers": pa.list_(pa.float64()),
        "whole": pa.int64(),
        "ranking": ranking,
        "rankings": pa.list_(ranking),
        "embedding": pa.list_(pa.float32(), width),
    }
    return pa.field(name, types[column_type])


class NumpyFile(RowFile):
    """Row file of embeddings: a float32 NumPy array `(rows, dims)`; NaN for rows without one.

    Until it is complete, the header declares 0 rows. On resume only the number of rows is checked.
    """

    def __init__(self, path: Path, columns: RowColumns) -> None:
        super().__init__(path, columns)
        if list(columns.answers.values()) != ["embedding"]:
            raise ConfigError(f"{path}: .npy files hold embeddings only. Use .jsonl or .parquet.")
        self._width, self._rows, self._skipped = 0, 0, 0

    def load_previous(self) -> Iterator[Any]:
        """Yields None for each complete row, as rows cannot be identified."""
        import numpy as np

        if (previous := self.existing) is None or not previous.stat().st_size:
            return
        with previous.open("rb") as file:
            np.lib.format.read_magic(file)
            shape = np.lib.format.read_array_header_1_0(file)[0]
            self._width, size = shape[1], previous.stat().st_size - file.tell()
        for _ in range(size // (4 * self._width) if self._width else 0):
            yield None

    def normalize(self, row: Row) -> Any:  # noqa: ARG002 - input columns are not written
        """Returns None, as `load_previous` does for every row."""
        return None

    def open(self, keep: int) -> None:
        """Open the file for appending after the first `keep` rows."""
        previous = self.existing
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if previous is None or not keep:
            self._file = open_new(self.partial, "wb+")
            return
        if previous == self.path:
            self.path.replace(self.partial)
        self._file, self._rows = open_existing(self.partial, "r+b"), keep
        self._write_header(0)
        self._file.truncate(self._file.tell() + 4 * keep * self._width)
        self._file.seek(0, os.SEEK_END)

    def write(self, rows: Sequence[Row]) -> None:
        """Append the embeddings of `rows`."""
        import numpy as np

        if self._file is None:
            raise RuntimeError("the file is not open")
        (name,) = self.columns.answers
        vectors = [row.get(name) for row in rows]
        if not self._width:
            self._width = next((len(vector) for vector in vectors if vector is not None), 0)
            if not self._width:
                self._skipped += len(rows)
                return
            self._write_header(0)
            vectors = [None] * self._skipped + vectors
        width = next((len(v) for v in vectors if v is not None), self._width)
        if width != self._width:
            raise InputError(
                f"{self.path} has embeddings of {self._width} dimensions, and these have {width}. "
                "Use the flags of the interrupted command, or choose another --output."
            )
        empty = np.full(self._width, np.nan, np.float32)
        block = np.stack([empty if vector is None else vector for vector in vectors])
        self._file.write(block.astype("<f4").tobytes())
        self._file.flush()
        self._rows += len(block)

    def _write_header(self, rows: int) -> None:
        import numpy as np

        if self._file is None:
            raise RuntimeError("the file is not open")
        self._file.seek(0)
        shape = (rows, self._width)
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )

    def finalize(self) -> None:
        """Write the number of rows into the header, and rename the file to `path`."""
        self._write_header(self._rows)
        super().finalize()


ROW_FILES: dict[str, type[RowFile]] = {
    ".csv": CommaSeparatedFile,
    ".tsv": TabSeparatedFile,
    ".jsonl": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".parquet": ParquetFile,
    ".npy": NumpyFile,
}
"""File suffix → format."""


def row_file_type(flag: str, path: Path) -> type[RowFile]:
    """Returns the class for the suffix of `path`; ConfigError on `flag` if that is unknown."""
    file_type = ROW_FILES.get(path.suffix.lower())
    if file_type is None:
        raise ConfigError(
            f"{flag} {path}: cannot write {path.suffix or 'a file without extension'!r}. "
            f"Formats: {join_names(ROW_FILES)}. Name the file by one of them."
        )
    return file_type


def check_row_file(flag: str, path: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ConfigError if `path` is unwritable, or exists without `resume` or `overwrite`."""
    row_file_type(flag, path)
    check_output_file(flag, path, overwrite=overwrite or resume)
    partial = partial_of(path)
    if partial.is_symlink():
        raise ConfigError(
            f"{flag} {path}: {partial.name} is a link to {partial.readlink()}. Delete the link."
        )
    if partial.exists() and not (resume or overwrite):
        raise ConfigError(
            f"{flag} {path}: {partial.name} has rows of an interrupted command. Resume it with "
            f"--resume, or delete it."
        )


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Save `rows`, whose keys may differ, atomically in one file."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = row_file_type("", path)(path, RowColumns(names))
    file.open(0)
    file.write(rows)
    file.finalize()
