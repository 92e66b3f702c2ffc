"""A local file to its reader, by the suffix of its name; read whole, or part by part."""

from __future__ import annotations

from pathlib import Path

from ftlevel.data.sources.readers.arrow import Arrow
from ftlevel.data.sources.readers.json_array import JsonArray
from ftlevel.data.sources.readers.json_lines import JsonLines
from ftlevel.data.sources.readers.paragraphs import Paragraphs
from ftlevel.data.sources.readers.parquet import Parquet
from ftlevel.data.sources.readers.separated import CommaSeparated, TabSeparated
from ftlevel.data.sources.streams import Reader, Stream, refuse_unreadable
from ftlevel.data.sources.table import OnBadRow, Table, resolve_bad
from ftlevel.errors import InputError, did_you_mean, listing

READERS: dict[str, type[Reader]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": JsonArray,
    ".csv": CommaSeparated,
    ".tsv": TabSeparated,
    ".parquet": Parquet,
    ".arrow": Arrow,
    ".feather": Arrow,
    ".txt": Paragraphs,
}
"""Every format that is read; a new one is a line here and a module beside this one."""

_HINTS = {
    ".gz": "Unpack it first: gunzip",
    ".bz2": "Unpack it first: bunzip2",
    ".xz": "Unpack it first: unxz",
    ".zst": "Unpack it first: unzstd",
    ".zip": "Unpack it first: unzip",
    ".xlsx": "Save the sheet as .csv:",
    ".xls": "Save the sheet as .csv:",
}


def read_table(path: Path, on_bad_row: OnBadRow = "error") -> Table:
    """Read the rows of one file.

    Args:
        path: the file; its extension names the format.
        on_bad_row: "error" refuses the file and names its bad rows; "skip" leaves them out and
            lists them in `dropped`. What spoils more than a row is refused in either case.

    Raises:
        InputError: the file is missing, of no known format, damaged, empty, or has bad rows.
    """
    format_ = _format_of(path)
    with refuse_unreadable(path):
        table, bad = format_(path).collect()
    if not table.rows and not bad:
        raise InputError(f"{path}: has 0 rows. Give a file with rows.")
    return resolve_bad(table, bad, on_bad_row)


def open_reader(path: Path) -> Reader:
    """Return the rows of one file, of which none is read yet, in parts or not.

    Raises:
        InputError: as of `read_table`.
    """
    format_ = _format_of(path)
    with refuse_unreadable(path):
        return format_(path)


def open_stream(path: Path) -> Stream:
    """Return the rows of one file, of which none is read yet.

    Raises:
        InputError: as of `read_table`, or no part of it can be read without the rest.
    """
    format_ = _format_of(path)
    if not format_.in_parts:
        streamed = [suffix for suffix, reader in READERS.items() if reader.in_parts]
        raise InputError(
            f"{path}: --streaming cannot read {path.suffix.lower()!r} part by part. "
            f"It reads {listing(streamed)}. Convert the file, or drop --streaming."
        )
    with refuse_unreadable(path):
        return format_(path)


def data_files(directory: Path) -> list[str]:
    """Return the names of the files in `directory` that can be read."""
    names = (entry.name for entry in directory.iterdir() if entry.is_file())
    return sorted(name for name in names if is_data_file_name(name))


def is_data_file_name(name: str) -> bool:
    """Tell whether `name` ends like a file that can be read."""
    return Path(name).suffix.lower() in READERS


def describe_missing(path: Path) -> str:
    """Return the message for a path that does not exist, with what is there instead."""
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: no such file, and no directory {folder}. Check the path."
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    place = "the current directory" if str(folder) == "." else str(folder)
    there = f"In {place}: {listing(names, 8)}." if names else f"{place} is empty."
    return f"{path}: no such file.{did_you_mean(path.name, names)} {there}"


def _format_of(path: Path) -> type[Reader]:
    """Return the format of `path`, which is a file with something in it."""
    with refuse_unreadable(path):
        if path.is_dir():
            names = data_files(path)
            there = f"Files in it: {listing(names)}." if names else "It holds no data file."
            raise InputError(f"{path}: is a directory, not a file. {there} Name one file.")
        if not path.exists():
            raise InputError(describe_missing(path))
        if path.stat().st_size == 0:
            raise InputError(f"{path}: has 0 rows (0 bytes). Give a file with rows.")
    suffix = path.suffix.lower()
    if suffix not in READERS:
        hint = _HINTS.get(suffix)
        raise InputError(
            f"{path}: cannot read {path.suffix or 'a file without extension'!r}. "
            f"Formats: {listing(READERS)}. "
            + (f"{hint} {path.name}" if hint else "Convert the file, or rename it to what it is.")
        )
    return READERS[suffix]
