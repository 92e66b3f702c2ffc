"""Readers of Parquet and Arrow IPC; conversion of Arrow tables, as of `datasets`, to rows."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.streams import (
    Chunk,
    Reader,
    describe_media,
    describe_null_keys,
    media_of_name,
)
from ftlevel.data.sources.table import Row, Table
from ftlevel.errors import InputError, join_names

_BATCH = 1 << 10  # rows per Arrow batch


class _BatchReader(Reader):
    """Base of the readers of Parquet and Arrow files, which declare types and class names."""

    unit = "row"
    uniform = True
    format_name: ClassVar[str]

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with refuse_damaged(path, self.format_name):
            self.schema = self.read_schema()
        check_columns(self.schema.names, str(path))
        self.label_names = class_names(self.schema.metadata)

    @abstractmethod
    def read_schema(self) -> Any:
        """Returns the Arrow schema of the file."""

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """Yields the record batches."""

    def read(self) -> Iterator[Chunk]:
        number = 0
        with refuse_damaged(self.path, self.format_name):
            for batch in self.batches():
                for start in range(0, batch.num_rows, CHUNK_ROWS):
                    rows = arrow_rows(batch.slice(start, CHUNK_ROWS), self.null_keys)
                    yield Chunk(rows, list(range(number + 1, number + 1 + len(rows))), [])
                    number += len(rows)


class ParquetReader(_BatchReader):
    """Reader of Parquet files, by row group."""

    format_name = "Parquet"

    def read_schema(self) -> Any:
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        # pq.read_table fails on duplicate column names, before they can be checked.
        self._file = pq.ParquetFile(self.path)
        schema = self._file.schema_arrow
        self._count = self._file.num_row_groups if schema.names else 0
        return schema

    def batches(self) -> Iterator[Any]:
        columns = self.schema.names if self.ignored else None
        for group in range(self._count):
            yield from self._file.iter_batches(_BATCH, row_groups=[group], columns=columns)

    def share(self, chunk: Chunk) -> float | None:
        return chunk.lines[-1] / max(1, self._file.metadata.num_rows)


class ArrowReader(_BatchReader):
    """Reader of Arrow IPC files and streams, by record batch."""

    format_name = "Arrow"

    def read_schema(self) -> Any:
        return self._open().schema

    def batches(self) -> Iterator[Any]:
        reader = self._open()
        is_file = hasattr(reader, "num_record_batches")
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            yield batch.select(self.schema.names)

    def _open(self) -> Any:
        import pyarrow as pa

        mapped = pa.memory_map(str(self.path))
        if mapped.read(6) == b"ARROW1":
            return pa.ipc.open_file(mapped)
        mapped.seek(0)
        return pa.ipc.open_stream(mapped)


@contextmanager
def refuse_damaged(path: Path, format_name: str) -> Iterator[None]:
    """Convert Arrow exceptions in the `with` block to `InputError`."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"{path}: not a readable {format_name} file ({first}). "
            "Was the download or copy cut short? Fetch it again."
        ) from None


def create_arrow_table(table: Any, source: str) -> Table:
    """Returns a `pyarrow.Table` as a `Table`; `InputError` without rows or for unusable columns."""
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
    """Returns the rows of a `pyarrow.Table` or `RecordBatch` as JSON values.

    Null keys, with which Arrow fills up the objects of a list, are dropped and counted in
    `null_keys` (modified). Maps and columns of the JSON type keep their nulls.
    """
    rows: list[Row] = content.to_pylist(maps_as_pydicts="lossy")
    return drop_null_keys(rows, content.schema, null_keys, decode=True)


def drop_null_keys(
    rows: list[Row], schema: Any, null_keys: Counter[str], *, decode: bool = False
) -> list[Row]:
    """Remove the null keys that Arrow adds to objects in lists of `rows` (modified); return `rows`.

    They are counted by path in `null_keys` (modified); other nulls stay. `schema` may be None.
    With `decode`, columns of the JSON type are text and are parsed.
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
    null_keys: Counter[str]
    decode: bool

    def clean(self, value: Any, type_: Any, path: str, *, in_list: bool = False) -> Any:
        if value is None:
            return None
        if _is_json(type_):
            return json.loads(value) if self.decode else value
        if isinstance(value, list):
            inner = getattr(type_, "value_type", None)
            return [self.clean(item, inner, path, in_list=True) for item in value]
        if not isinstance(value, dict):
            return value
        cleaned = {}
        is_map = hasattr(type_, "item_type")  # maps do not share keys between rows
        for key, item in value.items():
            if item is None and in_list and not is_map:
                self.null_keys[f"{path}.{key}"] += 1
            else:
                types = None if type_ is None or is_map else type_.field(key).type
                inner = type_.item_type if is_map else types
                cleaned[key] = self.clean(item, inner, f"{path}.{key}", in_list=in_list)
        return cleaned


def clean_value(value: Any, path: str, null_keys: Counter[str]) -> Any:
    """Returns a value of unknown Arrow type without null keys, see `drop_null_keys`."""
    return _Cleaner(null_keys, decode=False).clean(value, None, path)


def _is_nested(type_: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_nested(type_) or _is_json(type_)


def _is_json(type_: Any) -> bool:
    return getattr(type_, "extension_name", "") == "arrow.json"


def check_columns(names: list[str], source: str) -> None:
    """Raise `InputError` if two columns have the same name."""
    if len(set(names)) < len(names):
        repeated = sorted({repr(name) for name in names if names.count(name) > 1})
        raise InputError(f"{source}: has the column {join_names(repeated)} twice. Rename one.")


def refuse_media(schema: Any, source: str) -> None:
    """Raise `InputError` if the schema has columns of images, audio, video or binary files."""
    import pyarrow as pa

    features, media = _features(schema.metadata), []
    for field in schema:
        feature, type_ = features.get(field.name, {}), field.type
        while pa.types.is_list(type_) or pa.types.is_large_list(type_):
            feature, type_ = feature.get("feature", {}), type_.value_type
        feature_type = str(feature.get("_type", ""))
        members = [member.type for member in type_] if pa.types.is_struct(type_) else []
        has_bytes = any(pa.types.is_binary(t) or pa.types.is_large_binary(t) for t in members)
        if feature_type in ("Image", "Audio", "Video", "Pdf") or has_bytes:
            media_type = {"Image": "images", "Audio": "audio", "Video": "videos"}.get(feature_type)
            media.append((field.name, media_type or media_of_name(field.name) or "files"))
    if media:
        raise InputError(describe_media(source, media))


def _features(metadata: dict[bytes, bytes] | None) -> Mapping[str, Any]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def class_names(metadata: dict[bytes, bytes] | None) -> Mapping[str, tuple[str, ...]]:
    """Returns the class names by column that `datasets` stored in the schema metadata."""
    names = {}
    for column, feature in _features(metadata).items():
        while isinstance(inner := feature.get("feature"), dict):  # of a list
            feature = inner
        if feature.get("_type") == "ClassLabel":
            names[column] = tuple(feature["names"])
    return names
