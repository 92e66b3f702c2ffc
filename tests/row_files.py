"""Rows in a file of any format."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from ftlevel.artifacts.row_sinks import to_cell

CHUNK = 4


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write `rows` in the format of the suffix: lists in cells as JSON, tables in small chunks."""
    kind = path.suffix
    lines = [json.dumps(row, default=str) for row in rows]
    if kind == ".jsonl":
        path.write_text("".join(f"{line}\n" for line in lines))
    elif kind == ".json":
        path.write_text(f"[{', '.join(lines)}]")
    elif kind in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if kind == ".csv" else "\t")
            writer.writerow(rows[0])
            writer.writerows(map(to_cell, row.values()) for row in rows)
    elif kind == ".xlsx":
        book = pytest.importorskip("openpyxl").Workbook()
        for cells in [list(rows[0]), *(list(row.values()) for row in rows)]:
            book.active.append(cells)
        book.save(path)
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=CHUNK)
    elif kind == ".feather":
        pyarrow.feather.write_feather(pa.Table.from_pylist(rows), str(path), chunksize=CHUNK)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=CHUNK)
    return path
