"""Arrow's IPC files (Feather) and streams, batch by batch, as `datasets` and pandas write them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.readers.parquet import (
    arrow_rows,
    check_columns,
    class_names,
    refuse_damaged,
)
from ftlevel.data.sources.streams import Chunk, Cursor, Reader


class Arrow(Reader):
    """Arrow; its schema makes the rows uniform and names the classes."""

    unit = "row"
    uniform = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with refuse_damaged(path, "Arrow"):
            self.schema = self._open().schema
        check_columns(self.schema.names, str(path))
        self.label_names = class_names(self.schema.metadata)

    def _open(self) -> Any:
        """Return a reader of the file, or of the stream, which has no directory of its batches."""
        import pyarrow as pa  # type: ignore[import-untyped]

        source = pa.memory_map(str(self.path))
        if source.read(6) == b"ARROW1":
            return pa.ipc.open_file(source)
        source.seek(0)
        return pa.ipc.open_stream(source)

    def read(self, cursor: Cursor | None) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""
        at = cursor or {"batch": 0, "row": 0, "number": 0}
        skip, number = int(at["row"]), int(at["number"])
        with refuse_damaged(self.path, "Arrow"):
            for index, batch in enumerate(self._batches()):
                if index < int(at["batch"]):
                    continue
                for begin in range(skip, batch.num_rows, PART):
                    part = batch.select(self.schema.names).slice(begin, PART)
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
