"""Store encoded rows in a memory-mapped Arrow file.

A row takes four bytes per token on disk; its Python object is built on access.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ftlevel.data.encoding.row import ROW_TYPES, Encoded
from ftlevel.data.sources.lines import LazySequence, RowView

_BATCH = 1_000  # rows
_INTS = pa.list_(pa.int32())
_NONE = -1  # encodes None in a list of positions


def _label_type(labels: Any) -> str:
    if isinstance(labels, list):
        return "tokens"
    if isinstance(labels, tuple):
        return "floats" if isinstance(labels[0], float) else "span"
    return "float" if isinstance(labels, float) else "int"


_LABEL_TYPES = {
    "tokens": _INTS,
    "span": _INTS,
    "int": pa.int32(),
    "float": pa.float64(),
    "floats": pa.list_(pa.float64()),
}


@dataclass(frozen=True)
class ColumnCodec:
    """How a row field is stored: Arrow type, conversion to it (`store`) and back (`restore`)."""

    type: Any
    store: Callable[[Any], Any]
    restore: Callable[[Any], Any]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


COLUMNS: dict[str, ColumnCodec] = {
    "ints": ColumnCodec(_INTS, list, tuple),
    "positions": ColumnCodec(
        _INTS,
        lambda positions: [_NONE if at is None else at for at in positions],
        lambda values: tuple(None if at == _NONE else at for at in values),
    ),
    "pairs": ColumnCodec(
        _INTS,
        lambda pairs: [at for pair in pairs for at in pair],
        lambda values: tuple(zip(values[::2], values[1::2], strict=True)),
    ),
    "int": ColumnCodec(pa.int32(), int, int),
    "text": ColumnCodec(pa.string(), str, lambda value: value.as_py()),
    "json": ColumnCodec(pa.string(), json.dumps, lambda value: _frozen(json.loads(value.as_py()))),
}
"""Value of `column` in the field metadata → its storage."""


def _get_extra_fields(row_type: type[Encoded]) -> list[tuple[str, ColumnCodec]]:
    added = fields(row_type)[len(fields(Encoded)) :]
    return [(field.name, COLUMNS[field.metadata["column"]]) for field in added]


def to_batch(rows: Sequence[Encoded]) -> pa.RecordBatch:
    """Convert rows of one type to an Arrow record batch."""
    first = rows[0]
    label_type = _label_type(first.labels)
    arrays = {
        "input_ids": pa.array([r.input_ids for r in rows], _INTS),
        "labels": pa.array([r.labels for r in rows], _LABEL_TYPES[label_type]),
        "row": pa.array([r.row for r in rows], pa.int64()),
    }
    for name in first.extras:
        arrays[f"extra:{name}"] = pa.array([r.extras[name] for r in rows], _INTS)
    for name, column in _get_extra_fields(type(first)):
        arrays[name] = pa.array([column.store(getattr(r, name)) for r in rows], column.type)
    schema = pa.schema(
        [(name, array.type) for name, array in arrays.items()],
        metadata={"labels": label_type, "type": type(first).__name__},
    )
    return pa.record_batch(list(arrays.values()), schema=schema)


def write_store(path: Path, batches: Iterable[pa.RecordBatch]) -> RowStore:
    """Write `batches` to a file, atomically, and open it; raise `ValueError` if there are none."""
    partial = path.with_name(f".{path.name}.partial")
    writer = None
    with pa.OSFile(str(partial), "wb") as sink:
        for batch in batches:
            if writer is None:
                writer = pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
        if writer is None:
            raise ValueError("no rows to write")
        writer.close()
    partial.replace(path)
    return RowStore(path)


def rows_to_batches(rows: Iterable[Encoded]) -> Iterator[pa.RecordBatch]:
    """Yields `rows` as Arrow record batches; rows of one example stay in one batch."""
    batch: list[Encoded] = []
    for row in rows:
        if len(batch) >= _BATCH and row.row != batch[-1].row:
            yield to_batch(batch)
            batch = []
        batch.append(row)
    if batch:
        yield to_batch(batch)


class RowStore(LazySequence[Encoded]):
    """Memory-mapped rows of a file that `write_store` wrote: those at `indices` (None: all)."""

    def __init__(self, path: Path, indices: Any = None) -> None:
        self.path = path
        self._file = pa.ipc.open_file(pa.memory_map(str(path)).read_buffer())
        metadata = self._file.schema.metadata
        self._label_type = metadata[b"labels"].decode()
        self._row_type = ROW_TYPES[metadata[b"type"].decode()]
        self._batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.indices = indices
        self._views: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.indices) if self.indices is not None else int(self._starts[-1])

    def _item(self, at: int) -> Encoded:
        return self._build(int(self.indices[at]) if self.indices is not None else at)

    def take(self, indices: Any) -> RowStore:
        """Returns a store with the rows at `indices` (an array)."""
        indices = np.asarray(indices, dtype=np.int64)
        return RowStore(self.path, indices if self.indices is None else self.indices[indices])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the selected rows as record batches."""
        if self.indices is None:
            yield from self._batches
            return
        batch = np.searchsorted(self._starts, self.indices, side="right") - 1
        for start, end in pairwise([*np.flatnonzero(np.diff(batch, prepend=-1)), len(batch)]):
            number = batch[start]
            rows = pa.array(self.indices[start:end] - self._starts[number])
            yield self._batches[number].take(rows)

    @property
    def has_token_labels(self) -> bool:
        """Whether the labels of a row are a list of integers, such as token ids or tags."""
        return self._label_type == "tokens"

    def lengths(self) -> Any:
        """Returns `Encoded.length` of each row as a NumPy array."""
        if self._row_type.length is not Encoded.length:
            return _count_lengths(self)
        return self.token_counts()

    def token_counts(self) -> Any:
        """Returns the number of `input_ids` of each row as a NumPy array."""
        offsets = (batch.column("input_ids").offsets.to_numpy() for batch in self._batches)
        counts = np.concatenate([np.diff(values) for values in offsets])
        return counts if self.indices is None else counts[self.indices]

    def examples(self) -> Any:
        """Returns `Encoded.row` of each row as a NumPy array."""
        rows = np.concatenate([batch.column("row").to_numpy() for batch in self._batches])
        return rows if self.indices is None else rows[self.indices]

    def _view(self, batch: int) -> dict[str, Any]:
        if batch not in self._views:
            record_batch = self._batches[batch]
            names = record_batch.schema.names
            self._views[batch] = {name: _as_numpy(record_batch.column(name)) for name in names}
        return self._views[batch]

    def _build(self, at: int) -> Encoded:
        batch = bisect_right(self._starts, at) - 1
        view, i = self._view(batch), at - int(self._starts[batch])

        def values(name: str) -> list[Any]:
            flat, starts = view[name]
            return flat[starts[i] : starts[i + 1]].tolist()

        labels: Any
        if self._label_type in ("int", "float"):
            labels = view["labels"][i].item()
        else:
            labels = values("labels") if self.has_token_labels else tuple(values("labels"))
        extras = {n.removeprefix("extra:"): values(n) for n in view if n.startswith("extra:")}
        added = {
            name: column.restore(values(name) if column.type == _INTS else view[name][i])
            for name, column in _get_extra_fields(self._row_type)
        }
        ids, row = values("input_ids"), int(view["row"][i])
        return self._row_type(ids, labels, row, extras, **added)


def _as_numpy(array: Any) -> Any:
    if pa.types.is_list(array.type):
        return array.values.to_numpy(), array.offsets.to_numpy()
    return array if pa.types.is_string(array.type) else array.to_numpy()


def row_lengths(rows: Sequence[Encoded]) -> Any:
    """Returns the number of tokens of each row as a NumPy array; fast for a `RowStore`."""
    if isinstance(rows, RowStore):
        return rows.lengths()
    return _count_lengths(rows)


def token_counts(rows: Sequence[Encoded]) -> Any:
    """Returns the number of `input_ids` of each row, of all its texts together, as an array."""
    while isinstance(rows, RowView):
        rows = rows.rows
    if isinstance(rows, RowStore):
        return rows.token_counts()
    return np.fromiter((len(row.input_ids) for row in rows), dtype=np.int64, count=len(rows))


def _count_lengths(rows: Sequence[Encoded]) -> Any:
    return np.fromiter((row.length for row in rows), dtype=np.int64, count=len(rows))


def select_rows(rows: Sequence[Encoded], indices: Any) -> Sequence[Encoded]:
    """Returns the rows at `indices` (an array)."""
    if isinstance(rows, RowStore):
        return rows.take(indices)
    return [rows[i] for i in indices.tolist()]


Change = Callable[[Encoded], list[Encoded]]


def map_rows(rows: Sequence[Encoded], change: Change) -> Sequence[Encoded]:
    """Returns the concatenated lists `change(row)` of all rows; of a `RowStore`, as a new store."""
    changed = (piece for row in rows for piece in change(row))
    if not isinstance(rows, RowStore):
        return list(changed)
    try:
        return write_store(rows.path.with_suffix(".fitted"), rows_to_batches(changed))
    except ValueError:  # no rows are left
        return []
