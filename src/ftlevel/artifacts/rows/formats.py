"""A name to the format of its file, by the suffix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ftlevel.artifacts.files import check_file_free
from ftlevel.artifacts.rows.parquet_file import ParquetFile
from ftlevel.artifacts.rows.sinks import Row, RowColumns, RowFile, partial_of
from ftlevel.artifacts.rows.text_files import CommaSeparatedFile, JsonLinesFile, TabSeparatedFile
from ftlevel.errors import ConfigError, listing

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
