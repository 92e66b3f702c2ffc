"""Parquet, whose rows lie in a stream of Arrow's until it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftlevel.artifacts.rows.sinks import Row, RowColumns, RowFile, describe_columns
from ftlevel.errors import InputError

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
