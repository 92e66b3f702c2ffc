"""Readers of Parquet (by row group) and Arrow IPC files and streams (by record batch).

Also converts Arrow tables, such as those of `datasets`, to rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.readers.refused import describe_media, media_of_name
from ftlevel.data.sources.streams import Chunk, Cursor, Reader, describe_null_keys
from ftlevel.data.sources.table import Row, Table
from ftlevel.errors import InputError, join_names

_BATCH = 1 << 10  # rows per Arrow batch


class ParquetReader(Reader):
    """Reader of Parquet files; the schema makes rows uniform and declares class names."""

    unit = "row"
    uniform = True

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        super().__init__(path)
        with refuse_damaged(path, "Parquet"):
            # pq.read_table fails on duplicate column names, before they can be checked.
            self._file = pq.ParquetFile(path)
        schema = self._file.schema_arrow
        check_columns(schema.names, str(path))
        self._groups = self._file.num_row_groups if schema.names else 0
        self.schema = schema
        self.label_names = class_names(schema.metadata)

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks after `cursor`."""
        at = cursor or {"group": 0, "row": 0, "number": 0}
        skip, number = int(at["row"]), int(at["number"])
        groups = range(int(at["group"]), self._groups)
        with refuse_damaged(self.path, "Parquet"):
            for group in groups:
                row = 0
                for batch in self._file.iter_batches(
                    _BATCH, row_groups=[group], columns=self.schema.names if self.ignored else None
                ):
                    for begin in range(max(0, skip - row), batch.num_rows, CHUNK_ROWS):
                        rows = arrow_rows(batch.slice(begin, CHUNK_ROWS), self.null_keys)
                        numbers = list(range(number + 1, number + 1 + len(rows)))
                        number += len(rows)
                        after = {"group": group, "row": row + begin + len(rows), "number": number}
                        yield self.chunk(rows, numbers, [], after)
                    row += batch.num_rows
                skip = 0

    def share(self, chunk: Chunk) -> float | None:
        """Return the fraction of rows read up to the end of `chunk`."""
        return chunk.cursor["number"] / max(1, self._file.metadata.num_rows)


@contextmanager
def refuse_damaged(path: Path, what: str) -> Iterator[None]:
    """Convert Arrow exceptions to `InputError`."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"{path}: not a readable {what} file ({first}). "
            "Was the download or copy cut short? Fetch it again."
        ) from None


def build_arrow_table(table: Any, source: str) -> Table:
    """Return the rows of a `pyarrow.Table` as a table, numbered from 1.

    Raises `InputError` for a table without rows, duplicate column names, or media columns.
    """
    names = table.schema.names
    check_columns(names, source)
    if table.num_rows == 0 or not names:
        raise InputError(f"{source}: has 0 rows. Use a file with rows.")
    refuse_media(table.schema, source)
    null_keys: Counter[str] = Counter()
    rows = arrow_rows(table, null_keys)
    notes = tuple(describe_null_keys(null_keys, source))
    return Table(rows, list(range(1, len(rows) + 1)), source, unit="row", notes=notes)


def arrow_rows(content: Any, null_keys: Counter[str]) -> list[Row]:
    """Return the rows of a `pyarrow.Table` or `RecordBatch` as JSON values.

    Arrow fills keys missing from an object in a list with null. Such null keys are dropped and
    counted by path in `null_keys` (mutated). Maps and columns of the JSON type keep their nulls.
    """
    rows: list[Row] = content.to_pylist(maps_as_pydicts="lossy")
    return drop_null_keys(rows, content.schema, null_keys, decode=True)


def drop_null_keys(
    rows: list[Row], schema: Any, null_keys: Counter[str], *, decode: bool = False
) -> list[Row]:
    """Drop null keys that Arrow added to `rows`, and return it; count them in `null_keys`.

    Both are mutated. `schema` is Arrow's, or None if unknown. If `decode` is true, columns of the
    JSON type are still text and are parsed.
    """
    types = {} if schema is None else {field.name: field.type for field in schema}
    cleaner = _Cleaner(null_keys, decode)
    nested = [n for n in (rows[0] if rows else ()) if n not in types or _is_nested(types[n])]
    for row in rows:
        for name in nested:
            row[name] = cleaner.clean(row[name], types.get(name), name)
    return rows


@dataclass(frozen=True)
class _Cleaner:
    """Drops null keys, see `drop_null_keys`."""

    null_keys: Counter[str]
    decode: bool

    def clean(self, value: Any, type_: Any, path: str, *, in_list: bool = False) -> Any:
        """Return `value` without null keys; `type_` is its Arrow type, or None if unknown."""
        if value is None:
            return None
        if _is_json(type_):
            return json.loads(value) if self.decode else value
        if isinstance(value, list):
            inner = getattr(type_, "value_type", None)
            return [self.clean(item, inner, path, in_list=True) for item in value]
        if not isinstance(value, dict):
            return value
        kept = {}
        is_struct = not hasattr(type_, "item_type")  # maps do not share keys between rows
        for key, item in value.items():
            if item is None and in_list and is_struct:
                self.null_keys[f"{path}.{key}"] += 1
            else:
                inner = _type_of_key(type_, key)
                kept[key] = self.clean(item, inner, f"{path}.{key}", in_list=in_list)
        return kept


def clean_value(value: Any, path: str, null_keys: Counter[str]) -> Any:
    """Return a value of unknown Arrow type without null keys, see `drop_null_keys`."""
    return _Cleaner(null_keys, decode=False).clean(value, None, path)


def _is_nested(type_: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_nested(type_) or _is_json(type_)


def _is_json(type_: Any) -> bool:
    return getattr(type_, "extension_name", "") == "arrow.json"


def _type_of_key(type_: Any, key: str) -> Any:
    """Return the Arrow type of an object's key; None if unknown."""
    if hasattr(type_, "item_type"):
        return type_.item_type
    return None if type_ is None else type_.field(key).type


def check_columns(names: list[str], source: str) -> None:
    """Raise `InputError` if two columns have the same name."""
    if len(set(names)) < len(names):
        twice = sorted({repr(name) for name in names if names.count(name) > 1})
        raise InputError(f"{source}: has the column {join_names(twice)} twice. Rename one.")


def refuse_media(schema: Any, source: str) -> None:
    """Raise `InputError` if the schema has columns of images, audio, video or binary files."""
    import pyarrow as pa

    features, found = _features(schema.metadata), []
    for field in schema:
        feature, type_ = features.get(field.name, {}), field.type
        while pa.types.is_list(type_) or pa.types.is_large_list(type_):
            feature, type_ = feature.get("feature", {}), type_.value_type
        kind = str(feature.get("_type", ""))
        parts = [part.type for part in type_] if pa.types.is_struct(type_) else []
        bytes_ = any(pa.types.is_binary(t) or pa.types.is_large_binary(t) for t in parts)
        if kind in ("Image", "Audio", "Video", "Pdf") or bytes_:
            what = {"Image": "images", "Audio": "audio", "Video": "videos"}.get(kind)
            found.append((field.name, what or media_of_name(field.name) or "files"))
    if found:
        raise InputError(describe_media(source, found))


def _features(metadata: dict[bytes, bytes] | None) -> Mapping[str, Any]:
    """Return the `datasets` features stored in the schema metadata."""
    try:
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: each for name, each in found.items() if isinstance(each, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def class_names(metadata: dict[bytes, bytes] | None) -> Mapping[str, tuple[str, ...]]:
    """Return the class names by column that `datasets` stored in the schema metadata."""
    return {
        column: tuple(feature["names"])
        for column, feature in _features(metadata).items()
        if feature.get("_type") == "ClassLabel"
    }


class ArrowReader(Reader):
    """Reader of Arrow IPC files and streams; the schema makes rows uniform and names classes."""

    unit = "row"
    uniform = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with refuse_damaged(path, "Arrow"):
            self.schema = self._open().schema
        check_columns(self.schema.names, str(path))
        self.label_names = class_names(self.schema.metadata)

    def _open(self) -> Any:
        """Return a `pyarrow` reader of the IPC file, or of the stream, which has no batch index."""
        import pyarrow as pa

        source = pa.memory_map(str(self.path))
        if source.read(6) == b"ARROW1":
            return pa.ipc.open_file(source)
        source.seek(0)
        return pa.ipc.open_stream(source)

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks after `cursor`."""
        at = cursor or {"batch": 0, "row": 0, "number": 0}
        skip, number = int(at["row"]), int(at["number"])
        with refuse_damaged(self.path, "Arrow"):
            for index, batch in enumerate(self._batches()):
                if index < int(at["batch"]):
                    continue
                for begin in range(skip, batch.num_rows, CHUNK_ROWS):
                    part = batch.select(self.schema.names).slice(begin, CHUNK_ROWS)
                    rows = arrow_rows(part, self.null_keys)
                    numbers = list(range(number + 1, number + 1 + len(rows)))
                    number += len(rows)
                    after = {"batch": index, "row": begin + len(rows), "number": number}
                    yield self.chunk(rows, numbers, [], after)
                skip = 0

    def _batches(self) -> Iterator[Any]:
        opened = self._open()
        if hasattr(opened, "num_record_batches"):
            return (opened.get_batch(i) for i in range(opened.num_record_batches))
        return iter(opened)
