"""Parquet, row group by row group, and rows of Arrow's tables as the Hub's library gives them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.readers.refused import describe_media, media_of_name
from ftlevel.data.sources.streams import Chunk, Cursor, Reader
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError, listing

_BATCH = 1 << 10  # rows that are decoded to Arrow at once


class Parquet(Reader):
    """Parquet; its schema makes the rows uniform and names the classes."""

    unit = "row"
    uniform = True

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        super().__init__(path)
        with refuse_damaged(path, "Parquet"):
            # Not pq.read_table, whose data set layer fails on two columns of one name.
            self._file = pq.ParquetFile(path)
        schema = self._file.schema_arrow
        check_columns(schema.names, str(path))
        self._groups = self._file.num_row_groups if schema.names else 0
        self.schema = schema
        self.label_names = class_names(schema.metadata)

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        at = cursor or {"group": 0, "row": 0, "number": 0}
        skip, number = int(at["row"]), int(at["number"])
        groups = range(int(at["group"]), self._groups)
        with refuse_damaged(self.path, "Parquet"):
            for group in groups:
                row = 0
                for batch in self._file.iter_batches(
                    _BATCH, row_groups=[group], columns=self.schema.names if self.ignored else None
                ):
                    for begin in range(max(0, skip - row), batch.num_rows, PART):
                        rows = batch.slice(begin, PART).to_pylist()
                        numbers = list(range(number + 1, number + 1 + len(rows)))
                        number += len(rows)
                        after = {"group": group, "row": row + begin + len(rows), "number": number}
                        yield self.chunk(rows, numbers, [], after)
                    row += batch.num_rows
                skip = 0

    def share(self, chunk: Chunk) -> float | None:
        """Return which part of the rows is read behind `chunk`."""
        return chunk.cursor["number"] / max(1, self._file.metadata.num_rows)


@contextmanager
def refuse_damaged(path: Path, what: str) -> Iterator[None]:
    """Turn Arrow's complaints about a file into an `InputError`."""
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
    """Turn a `pyarrow.Table` into rows with their 1-based numbers.

    Raises:
        InputError: it has no rows, or two columns of one name.
    """
    names = table.schema.names
    check_columns(names, source)
    if table.num_rows == 0 or not names:
        raise InputError(f"{source}: has 0 rows. Give a file with rows.")
    refuse_media(table.schema, source)
    rows = table.to_pylist()
    return Table(rows, list(range(1, len(rows) + 1)), source, unit="row")


def check_columns(names: list[str], source: str) -> None:
    """Refuse two columns of one name.

    Raises:
        InputError: naming them.
    """
    if len(set(names)) < len(names):
        twice = sorted({repr(name) for name in names if names.count(name) > 1})
        raise InputError(f"{source}: has the column {listing(twice)} twice. Rename one.")


def refuse_media(schema: Any, source: str) -> None:
    """Refuse columns of images, audio or video that the types in a schema tell.

    Raises:
        InputError: naming them.
    """
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
    """Return what `datasets` writes of each column into a schema."""
    try:
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: each for name, each in found.items() if isinstance(each, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def class_names(metadata: dict[bytes, bytes] | None) -> Mapping[str, tuple[str, ...]]:
    """Return the class names that `datasets` writes into a schema, for each column with some."""
    return {
        column: tuple(feature["names"])
        for column, feature in _features(metadata).items()
        if feature.get("_type") == "ClassLabel"
    }
