"""Files to rows: .jsonl, .ndjson, .json, .csv, .tsv, .parquet and .txt.

A file is read as it is or refused with `path:line`; no value is converted, filled in or guessed.
CSV cells stay strings. A .txt file gives one row for each paragraph (a run of lines without a blank
line between them), in the column "text". This room knows nothing of tasks.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from ftlevel.data.sources import lines
from ftlevel.data.sources.json_rows import Raw, RawLines, read_json_array, read_json_lines
from ftlevel.data.sources.table import BadRow, OnBadRow, Table, settle
from ftlevel.data.sources.uniform import find_odd_rows
from ftlevel.errors import InputError, did_you_mean, listing

Found: TypeAlias = tuple[Table, list[BadRow]]  # bad rows may still stand in the table

_HINTS = {
    ".gz": "Unpack it first: gunzip",
    ".bz2": "Unpack it first: bunzip2",
    ".xz": "Unpack it first: unxz",
    ".zst": "Unpack it first: unzstd",
    ".zip": "Unpack it first: unzip",
    ".xlsx": "Save the sheet as .csv:",
    ".xls": "Save the sheet as .csv:",
    ".arrow": "Name the directory that save_to_disk wrote, not",
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
    source = str(path)
    read = _READERS.get(path.suffix.lower())
    _check_file(path, source)
    if read is None:
        hint = _HINTS.get(path.suffix.lower())
        raise InputError(
            f"{source}: cannot read {path.suffix or 'a file without extension'!r}. "
            f"Formats: {listing(_READERS)}. "
            + (f"{hint} {path.name}" if hint else "Convert the file, or rename it to what it is.")
        )
    try:
        table, bad = read(path, source)
    except UnicodeDecodeError:
        raise InputError(_describe_encoding(path, source)) from None
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror or error}).") from error
    return settle(table, bad, on_bad_row)


def data_files(directory: Path) -> list[str]:
    """Return the names of the files in `directory` that `read_table` can read."""
    names = (entry.name for entry in directory.iterdir() if entry.is_file())
    return sorted(name for name in names if Path(name).suffix.lower() in _READERS)


def describe_missing(path: Path) -> str:
    """Return the message for a path that does not exist, with what is there instead."""
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: no such file, and no directory {folder}. Check the path."
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    place = "the current directory" if str(folder) == "." else str(folder)
    there = f"In {place}: {listing(names, 8)}." if names else f"{place} is empty."
    return f"{path}: no such file.{did_you_mean(path.name, names)} {there}"


def is_data_file_name(name: str) -> bool:
    """Tell whether `name` ends like a file that `read_table` reads."""
    return Path(name).suffix.lower() in _READERS


def _check_file(path: Path, source: str) -> None:
    """Raise `InputError` unless `path` is a file with something in it."""
    try:
        if path.is_dir():
            names = data_files(path)
            there = f"Files in it: {listing(names)}." if names else "It holds no data file."
            raise InputError(f"{source}: is a directory, not a file. {there} Name one file.")
        if not path.exists():
            raise InputError(describe_missing(path))
        if path.stat().st_size == 0:
            raise InputError(f"{source}: has 0 rows (0 bytes). Give a file with rows.")
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror or error}).") from error


@contextmanager
def _open_text(path: Path, source: str, newline: str) -> Iterator[TextIO]:
    """Open a UTF-8 file, with or without a byte order mark.

    Raises:
        InputError: the first bytes are those of something else.
    """
    _check_head(path, source)
    with path.open(encoding="utf-8-sig", newline=newline) as stream:
        yield stream


def check_opening(path: Path) -> None:
    """Refuse a text file that is missing, empty, or begins as something else does.

    Raises:
        InputError: it is.
    """
    _check_file(path, str(path))
    _check_head(path, str(path))
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        with path.open("rb") as file:
            _check_no_array(path, file.readline().decode("utf-8-sig", errors="replace"))


def _check_head(path: Path, source: str) -> None:
    with path.open("rb") as binary:
        head = binary.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _looks_like_utf16(head):
        raise InputError(
            f"{source}:1: looks like UTF-16, not UTF-8 (byte 0x{head[0]:02x} at offset 0). "
            f"Convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}"
        )
    if head.startswith(b"\x1f\x8b"):
        raise InputError(
            f"{source}: is compressed by gzip. Unpack it, or name it .gz and gunzip it."
        )
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{source}: is a Git LFS pointer, not the data. Fetch the data: git lfs pull"
        )


def _looks_like_utf16(head: bytes) -> bool:
    """Tell whether every other byte is zero, as in Latin text of UTF-16 without a mark."""
    return len(head) > 3 and max(head[::2].count(0), head[1::2].count(0)) > 0.4 * len(head)


def _describe_encoding(path: Path, source: str) -> str:
    """Return the message for a file with a byte that is not UTF-8, by line and offset."""
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        cut = error.reason == "unexpected end of data"
        return describe_byte(path, line, content[error.start], error.start, cut=cut)
    return f"{source}: changed while it was read. Run again."


def describe_byte(path: Path, line: int, byte: int, offset: int, *, cut: bool) -> str:
    """Return the message for a byte that is not UTF-8, or at which the file ends too early."""
    at = f"(byte 0x{byte:02x} at offset {offset:,})"
    if cut:
        return (
            f"{path}:{line}: the file ends inside a character {at}: "
            "was the download or copy cut short? Fetch it again."
        )
    return (
        f"{path}:{line}: not UTF-8 {at}. If it is Latin-1: "
        f"iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}"
    )


def _build_table(raw: Raw, source: str, *, uniform: bool) -> Found:
    """Turn what a reader found into a table and its bad rows; refuse an empty file."""
    table = Table(raw.rows, raw.lines, source)
    if not raw.rows and not raw.bad:
        raise InputError(f"{source}: has 0 rows. Give a file with rows.")
    if uniform:
        odd = []
    elif isinstance(raw, RawLines):
        odd = raw.shapes.find_odd(raw.rows, raw.lines)
    else:
        odd = find_odd_rows(raw.rows, raw.lines)
    return table, [*raw.bad, *odd]


def _check_no_array(path: Path, first: str) -> None:
    if first.strip() == "[" or first.lstrip().startswith("[{"):
        raise InputError(
            f"{path}:1: looks like one JSON array, where one object a line is expected. "
            f"Rename it to {path.with_suffix('.json').name}"
        )


def _read_jsonl(path: Path, source: str) -> Found:
    with _open_text(path, source, "\n") as stream:
        _check_no_array(path, stream.readline())
        if path.stat().st_size >= lines.LARGE_BYTES:
            return _build_table(RawLines.read(path), source, uniform=False)
        stream.seek(0)
        return _build_table(read_json_lines(stream), source, uniform=False)


def _read_json(path: Path, source: str) -> Found:
    """Read an array of objects; a file that begins with an object is taken as JSON Lines."""
    with _open_text(path, source, "\n") as stream:
        text = stream.read()
    start = text.lstrip()[:1]
    if start == "[":
        return _build_table(read_json_array(text, source), source, uniform=False)
    if start == "{":
        _check_not_one_object(text, source)
    split = text.split("\n")
    stream_lines = [f"{line}\n" for line in split[:-1]] + ([split[-1]] if split[-1] else [])
    return _build_table(read_json_lines(stream_lines), source, uniform=False)


def _check_not_one_object(text: str, source: str) -> None:
    """Raise if the file is one object over several lines: a wrapper, not rows."""
    try:
        whole = json.loads(text) if "\n" in text.strip() else None
    except (ValueError, RecursionError):
        return  # several objects, or a broken one: the line reader says which
    if isinstance(whole, dict):
        lists = [key for key, value in whole.items() if isinstance(value, list)]
        hint = f"Save the list in {lists[0]!r} as the file" if lists else "Write [ … ] around it"
        raise InputError(
            f"{source}:1: one object (keys {listing([repr(key) for key in whole])}), "
            f"where an array of objects is expected. {hint}."
        )


def _read_csv(path: Path, source: str) -> Found:
    return _read_separated(path, source, ",")


def _read_tsv(path: Path, source: str) -> Found:
    return _read_separated(path, source, "\t")


def _read_separated(path: Path, source: str, separator: str) -> Found:
    """Read a table with a header line; quotes work as in CSV, also between tabs."""
    raw = Raw()
    begin = 1
    # A cell longer than the csv module's 128 KiB is an ordinary document. The limit is global.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with _open_text(path, source, "") as stream:
            reader = csv.reader(stream, delimiter=separator, strict=True)
            header = next((cells for cells in reader if cells), None)
            if header is not None:
                check_header(header, f"{source}:{reader.line_num}", separator)
            begin = reader.line_num + 1
            for cells in reader:
                if not cells:
                    pass
                elif len(cells) != len(header or ()):
                    reason = f"has {len(cells)} cells, but the header has {len(header or ())}"
                    raw.bad.append(BadRow(begin, reason))
                else:
                    raw.add(dict(zip(header or (), cells, strict=True)), begin)
                begin = reader.line_num + 1
    except csv.Error as error:
        raise InputError(describe_csv(error, source, begin)) from None
    finally:
        csv.field_size_limit(limit)
    return _build_table(raw, source, uniform=True)


def describe_csv(error: csv.Error, source: str, line: int) -> str:
    """Return the message for a quote that is out of place; the rows past it can't be trusted."""
    if "end of data" in str(error):
        return f'{source}:{line}: a quote (") is opened in this row and never closed. Close it.'
    return (
        f"{source}:{line}: not valid CSV ({error}). "
        'Put quotes around the whole cell and double (") those inside it.'
    )


def check_header(header: list[str], place: str, separator: str) -> None:
    """Raise unless the header names every column, once."""
    twice = sorted({name for name in header if header.count(name) > 1 and name})
    if twice:
        raise InputError(
            f"{place}: the header has {listing([repr(name) for name in twice])} twice. "
            "Give every column its own name."
        )
    if "" in header:
        number = header.index("") + 1
        pandas = " It looks like a pandas index: write with index=False." if number == 1 else ""
        raise InputError(
            f"{place}: column {number} of the header has no name.{pandas} Name every column."
        )
    if len(header) == 1:
        other = next((mark for mark in ";\t,|" if mark != separator and mark in header[0]), None)
        if other:
            raise InputError(
                f"{place}: one column, named {header[0]!r}: the file is separated by {other!r}, "
                f"not {separator!r}. " + ("Rename it to .tsv." if other == "\t" else "Convert it.")
            )


def _read_txt(path: Path, source: str) -> Found:
    """Read one row a paragraph; the line breaks inside a paragraph are kept."""
    raw = Raw()
    with _open_text(path, source, "\n") as stream:
        for line, text in _paragraphs(stream):
            raw.add({"text": text}, line)
    return _build_table(raw, source, uniform=True)


def _paragraphs(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield each run of non-blank lines with the number of its first line."""
    run: list[str] = []
    number = 0
    for number, line in enumerate(lines, 1):
        if line.strip():
            run.append(line.rstrip("\r\n"))
        elif run:
            yield number - len(run), "\n".join(run)
            run = []
    if run:
        yield number - len(run) + 1, "\n".join(run)


def _read_parquet(path: Path, source: str) -> Found:
    """Read a Parquet file; its schema already makes the rows uniform."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        # Not pq.read_table, whose data set layer fails on two columns of one name.
        table = pq.ParquetFile(path).read()
    except pa.ArrowException as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"{source}: not a readable Parquet file ({first}). "
            "Was the download or copy cut short? Fetch it again."
        ) from None
    return build_arrow_table(table, source), []


def build_arrow_table(table: Any, source: str) -> Table:
    """Turn a `pyarrow.Table` into rows with their 1-based numbers.

    Raises:
        InputError: it has no rows, or two columns of one name.
    """
    names = table.schema.names
    if len(set(names)) < len(names):
        twice = sorted({repr(name) for name in names if names.count(name) > 1})
        raise InputError(f"{source}: has the column {listing(twice)} twice. Rename one.")
    if table.num_rows == 0 or not names:
        raise InputError(f"{source}: has 0 rows. Give a file with rows.")
    rows = table.to_pylist()
    numbers = list(range(1, len(rows) + 1))
    return Table(rows, numbers, source, unit="row", label_names=_class_names(table.schema.metadata))


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Return the class names that `datasets` writes into a schema, for each column with some."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {
        column: tuple(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


_READERS: dict[str, Callable[[Path, str], Found]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
