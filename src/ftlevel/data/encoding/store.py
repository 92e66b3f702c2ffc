"""Store encoded rows in a memory-mapped Arrow file.

A row takes four bytes per token on disk; its Python object is built on access.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ftlevel.data.encoding.encode import ROW_TYPES, Encoded
from ftlevel.data.sources.lines import LazySequence

_BATCH = 1_000  # rows
_INTS = pa.list_(pa.int32())
_NONE = -1  # encodes None in a list of positions


def _kind_of(labels: Any) -> str:
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
    """Storage of a row field: Arrow type and conversions; `restore` gets a list or one element."""

    type: Any
    store: Callable[[Any], Any]
    restore: Callable[[Any], Any]


def _frozen(value: Any) -> Any:
    """Convert lists to tuples recursively."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


COLUMNS: dict[str, ColumnCodec] = {
    "ints": ColumnCodec(_INTS, list, tuple),
    "places": ColumnCodec(
        _INTS,
        lambda places: [_NONE if place is None else place for place in places],
        lambda held: tuple(None if place == _NONE else place for place in held),
    ),
    "pairs": ColumnCodec(
        _INTS,
        lambda pairs: [at for pair in pairs for at in pair],
        lambda held: tuple(zip(held[::2], held[1::2], strict=True)),
    ),
    "int": ColumnCodec(pa.int32(), int, int),
    "text": ColumnCodec(pa.string(), str, lambda held: held.as_py()),
    "json": ColumnCodec(pa.string(), json.dumps, lambda held: _frozen(json.loads(held.as_py()))),
}
"""Value of `column` in the field metadata → its storage."""


def _extra_columns(kind: type[Encoded]) -> list[tuple[str, ColumnCodec]]:
    own = fields(kind)[len(fields(Encoded)) :]
    return [(field.name, COLUMNS[field.metadata["column"]]) for field in own]


def to_batch(rows: Sequence[Encoded]) -> pa.RecordBatch:
    """Convert rows of one type to an Arrow record batch."""
    first = rows[0]
    kind = _kind_of(first.labels)
    arrays = {
        "input_ids": pa.array([r.input_ids for r in rows], _INTS),
        "labels": pa.array([r.labels for r in rows], _LABEL_TYPES[kind]),
        "row": pa.array([r.row for r in rows], pa.int64()),
    }
    for name in first.extras:
        arrays[f"extra:{name}"] = pa.array([r.extras[name] for r in rows], _INTS)
    for name, column in _extra_columns(type(first)):
        arrays[name] = pa.array([column.store(getattr(r, name)) for r in rows], column.type)
    schema = pa.schema(
        [(name, array.type) for name, array in arrays.items()],
        metadata={"labels": kind, "type": type(first).__name__},
    )
    return pa.record_batch(list(arrays.values()), schema=schema)


def write_store(path: Path, batches: Iterable[pa.RecordBatch]) -> RowStore:
    """Write batches to `path` atomically and memory-map it; raise `ValueError` without batches."""
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
    """Yield `rows` in batches; rows of one example stay in one batch."""
    pending: list[Encoded] = []
    for row in rows:
        if len(pending) >= _BATCH and row.row != pending[-1].row:
            yield to_batch(pending)
            pending = []
        pending.append(row)
    if pending:
        yield to_batch(pending)


class RowStore(LazySequence[Encoded]):
    """Rows in a file written by `write_store`, which must stay in place.

    `indices` selects rows; None selects all. `batches` requires ascending indices.
    """

    def __init__(self, path: Path, indices: Any = None) -> None:
        self.path = path
        self._bytes = pa.memory_map(str(path)).read_buffer()
        self._file = pa.ipc.open_file(self._bytes)
        metadata = self._file.schema.metadata
        self._kind, self._type = metadata[b"labels"].decode(), metadata[b"type"].decode()
        self._batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self.indices = indices
        self._views: dict[int, dict[str, Any]] = {}
        self._places: tuple[Any, Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.indices) if self.indices is not None else int(self._starts[-1])

    def _item(self, at: int) -> Encoded:
        return self._build(int(self.indices[at]) if self.indices is not None else at)

    def take(self, indices: Any) -> RowStore:
        """Return a store with the rows at `indices` (an array)."""
        chosen = np.asarray(indices, dtype=np.int64)
        return RowStore(self.path, chosen if self.indices is None else self.indices[chosen])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the selected rows as record batches."""
        if self.indices is None:
            yield from self._batches
            return
        ends = np.searchsorted(self.indices, self._starts)  # indices are ascending
        for batch, first, begin, end in zip(
            self._batches, self._starts, ends, ends[1:], strict=False
        ):
            if begin < end:
                yield batch.take(pa.array(self.indices[begin:end] - first))

    @property
    def has_token_labels(self) -> bool:
        """Whether labels are lists of tokens."""
        return self._kind == "tokens"

    def lengths(self) -> Any:
        """Return `Encoded.length` of each row as a NumPy array."""
        if ROW_TYPES[self._type].length is not Encoded.length:
            return _count_lengths(self)
        every = np.empty(int(self._starts[-1]), dtype=np.int32)
        for begin, batch in zip(self._starts, self._batches, strict=False):
            lengths = np.diff(batch.column("input_ids").offsets.to_numpy())
            every[begin : begin + len(lengths)] = lengths
        return every if self.indices is None else every[self.indices]

    def gather(self, at: Any) -> tuple[Any, Any]:
        """Return the concatenated `input_ids` of the rows at `at` (an array), and their offsets.

        The mapped file is read as int32 values, without building rows.
        """
        if self._places is None:
            columns = [batch.column("input_ids") for batch in self._batches]
            base = self._bytes.address
            self._places = (
                np.frombuffer(self._bytes, np.int32, self._bytes.size // 4),
                np.array([(c.values.buffers()[1].address - base) // 4 for c in columns]),
                np.array([(c.buffers()[1].address - base) // 4 for c in columns]),
            )
        whole, values, offsets = self._places
        chosen = np.asarray(at) if self.indices is None else self.indices[at]
        batch = np.searchsorted(self._starts, chosen, side="right") - 1
        place = offsets[batch] + chosen - self._starts[batch]
        begins = whole[place].astype(np.int64)
        lengths = whole[place + 1] - begins
        starts = np.zeros(len(chosen) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        places = np.repeat(values[batch] + begins - starts[:-1], lengths)
        places += np.arange(starts[-1])
        return whole[places], starts

    def _view(self, batch: int) -> dict[str, Any]:
        if batch not in self._views:
            columns = self._batches[batch]
            self._views[batch] = {
                name: _as_numpy(columns.column(name)) for name in columns.schema.names
            }
        return self._views[batch]

    def _build(self, at: int) -> Encoded:
        batch = bisect_right(self._starts, at) - 1
        view, i = self._view(batch), at - int(self._starts[batch])

        def values(name: str) -> list[Any]:
            flat, starts = view[name]
            return flat[starts[i] : starts[i + 1]].tolist()

        labels: Any
        if self._kind in ("tokens", "span", "floats"):
            labels = values("labels")
            labels = labels if self._kind == "tokens" else tuple(labels)
        else:
            labels = view["labels"][i].item()
        extras = {n.removeprefix("extra:"): values(n) for n in view if n.startswith("extra:")}
        ids, row = values("input_ids"), int(view["row"][i])
        kind = ROW_TYPES[self._type]
        more = {
            name: column.restore(values(name) if column.type == _INTS else view[name][i])
            for name, column in _extra_columns(kind)
        }
        return kind(ids, labels, row, extras, **more)


def _as_numpy(array: Any) -> Any:
    """Return scalars as an array, lists as values and offsets, and texts unchanged."""
    if pa.types.is_list(array.type):
        return array.values.to_numpy(), array.offsets.to_numpy()
    return array if pa.types.is_string(array.type) else array.to_numpy()


def row_lengths(rows: Sequence[Encoded]) -> Any:
    """Return the number of tokens of each row as a NumPy array; fast for a `RowStore`."""
    if isinstance(rows, RowStore):
        return rows.lengths()
    return _count_lengths(rows)


def _count_lengths(rows: Sequence[Encoded]) -> Any:
    return np.fromiter((row.length for row in rows), dtype=np.int64, count=len(rows))


def select_rows(rows: Sequence[Encoded], indices: Any) -> Sequence[Encoded]:
    """Return the rows at `indices` (an array)."""
    if isinstance(rows, RowStore):
        return rows.take(indices)
    return [rows[i] for i in indices.tolist()]


Change = Callable[[Encoded], list[Encoded]]


def map_rows(rows: Sequence[Encoded], change: Change) -> Sequence[Encoded]:
    """Apply `change` to each row; for a `RowStore`, write the result to a new file."""
    changed = (piece for row in rows for piece in change(row))
    if not isinstance(rows, RowStore):
        return list(changed)
    try:
        return write_store(rows.path.with_suffix(".fitted"), rows_to_batches(changed))
    except ValueError:  # no rows are left
        return []
