"""Select the reader of a local file, by suffix or content, and read it as a table or a stream.

There is one class per file format, which yields chunks of rows with lines. Readers do not
convert, fill in or guess values; an invalid file raises `InputError` with `path:line`.
`READERS` registers the formats. This package must not import `splits` or `hub`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from ftlevel.data.sources.lines import (
    STDIN,
    cache_pipe,
    cache_stdin,
    decompress,
    is_compressed,
    is_pipe,
    plain_name,
)
from ftlevel.data.sources.readers.arrow import ArrowReader, ParquetReader, refuse_media
from ftlevel.data.sources.readers.json import JsonLinesReader, JsonReader
from ftlevel.data.sources.readers.tables import CsvReader, ExcelReader, TsvReader
from ftlevel.data.sources.readers.text import (
    ConllReader,
    ParagraphReader,
    detect_file_format,
    head_lines,
    looks_like_conll,
)
from ftlevel.data.sources.streams import Reader, check_is_file, refuse_unknown, wrap_read_errors
from ftlevel.data.sources.table import OnBadRow, Table, handle_bad_rows
from ftlevel.errors import InputError, did_you_mean, join_names
from ftlevel.extensions import loaded

READERS: dict[str, type[Reader]] = {
    ".jsonl": JsonLinesReader,
    ".ndjson": JsonLinesReader,
    ".json": JsonReader,
    ".csv": CsvReader,
    ".tsv": TsvReader,
    ".parquet": ParquetReader,
    ".arrow": ArrowReader,
    ".feather": ArrowReader,
    ".txt": ParagraphReader,
    ".xlsx": ExcelReader,
    ".conll": ConllReader,
    ".bio": ConllReader,
    ".iob": ConllReader,
    ".iob2": ConllReader,
}
READERS |= loaded("formats", READERS)
"""Reader class by suffix; a new format needs one line here and a class in this package."""


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a file.

    Attributes:
        format: a suffix without its dot; None detects it.
        subset: sheet of a workbook (None: the first) or configuration of a Hub dataset.
        columns: names that identify the header of a table on stdin.
        limit: number of rows to keep where rows can be read one by one; None for all.
    """

    format: str | None = None
    subset: str | None = None
    columns: Collection[str] = ()
    ignored: Sequence[str] = ()
    limit: int | None = None


DEFAULT_READ_OPTIONS = ReadOptions()


def load_table(
    name: str | Path, on_bad_row: OnBadRow = "error", options: ReadOptions = DEFAULT_READ_OPTIONS
) -> Table:
    """Load the rows of a file, which may be compressed, or of stdin ("-").

    If `on_bad_row` is "skip", invalid rows are moved to `Table.dropped` instead of raising. Raises
    `InputError` for a missing, unsupported, corrupted or empty file, and for invalid rows.
    """
    reader = open_reader(name, options)
    table, bad = reader.collect()
    if not table.rows and not bad:
        raise InputError(f"{reader.shown}: has 0 rows. Use a file with rows.")
    return handle_bad_rows(table, bad, on_bad_row).without_columns(options.ignored)


def open_reader(name: str | Path, options: ReadOptions = DEFAULT_READ_OPTIONS) -> Reader:
    """Open the reader of a file; raise `InputError` if it is missing, unsupported or empty."""
    if options.format is not None and f".{options.format}" not in READERS:
        names = [suffix[1:] for suffix in READERS]
        raise InputError(
            f"--input-format {options.format}: no such "
            f"format.{did_you_mean(options.format, names)} Formats: {join_names(names, 20)}."
        )
    path = Path(name).expanduser()
    piped = str(name) == STDIN or is_pipe(path)
    shown = "stdin" if str(name) == STDIN else str(name)
    with wrap_read_errors(path):
        if piped:
            copy = cache_stdin() if shown == "stdin" else cache_pipe(path)
        else:
            check_is_file(path, data_files)
            suffix = Path(plain_name(path.name)).suffix.lower()
            if options.format is None and suffix not in READERS:
                raise refuse_unknown(path, suffix, list(READERS))
            copy = decompress(path) if is_compressed(path) else path
        if copy.stat().st_size == 0:
            raise InputError(f"{shown}: has 0 rows (0 bytes). Use a file with rows.")
        format_, note = _detect_format(copy, shown, options)
    with wrap_read_errors(copy, shown):
        reader = ExcelReader(copy, options.subset) if format_ is ExcelReader else format_(copy)
    reader.shown = shown
    if reader.schema is not None:
        reader.ignored = tuple(each for each in options.ignored if each in reader.schema.names)
        for column in reader.ignored:
            reader.schema = reader.schema.remove(reader.schema.get_field_index(column))
        refuse_media(reader.schema, shown)
    notes = [f"read as {note}"] if note else []
    if options.subset is not None and format_ is not ExcelReader:
        notes.append(f"--subset {options.subset} is not used: it is one table, without sheets")
    reader.notes[:] = [f"{shown}: {each}" for each in [*notes, *reader.notes]]
    return reader


def match_files(pattern: str, format_: str | None = None) -> list[Path]:
    """Returns the files that match a glob pattern (`**` is recursive), sorted; raises if none does.

    Unless `format_` is set, files with unsupported suffixes are skipped.
    """
    expanded = str(Path(pattern).expanduser())
    paths = map(Path, glob(expanded, recursive=True))  # noqa: PTH207 - Path.glob: relative only
    files = sorted(path for path in paths if not path.is_dir())
    matched = [path for path in files if format_ or is_data_file_name(path.name)]
    if not matched:
        matches = f"none of {join_names(map(str, files), 4)} can be read" if files else "no file"
        raise InputError(
            f"{pattern}: this pattern matches {matches}. Check the directory and the ending; those "
            f"that are read: {join_names(READERS, 20)}."
        )
    return matched


def is_pattern(name: str) -> bool:
    """Returns whether `name` is a glob pattern and not the name of an existing file."""
    return any(mark in name for mark in "*?[") and not Path(name).expanduser().exists()


def data_files(directory: Path) -> list[str]:
    """Returns the names of the supported files in `directory`."""
    names = (entry.name for entry in directory.iterdir() if entry.is_file())
    return sorted(name for name in names if is_data_file_name(name))


def is_data_file_name(name: str) -> bool:
    """Returns whether `name` has a supported suffix."""
    return Path(plain_name(name)).suffix.lower() in READERS


def stem_of(name: str) -> str:
    """Returns a file name without the suffixes of its format and compression."""
    return Path(plain_name(name)).stem


def _detect_format(path: Path, shown: str, options: ReadOptions) -> tuple[type[Reader], str]:
    """Returns the reader class of a file, and a note if the content, not the suffix, decided."""
    if options.format is not None:
        return READERS[f".{options.format}"], ""
    suffix = path.suffix.lower()
    if suffix not in READERS:  # stdin or a pipe
        detected = detect_file_format(path, options.columns)
        if detected is None:
            first = next((line for line in head_lines(path) if line.strip()), "")
            raise InputError(
                f"{shown}: its first line, {first[:40]!r}, does not identify its format. Add "
                f"--input-format, one of {join_names((each[1:] for each in READERS), 20)}."
            )
        format_, reason = detected
        return READERS[format_], f"{format_[1:]}: {reason}"
    if suffix in (".txt", ".tsv") and looks_like_conll(head_lines(path)):
        return READERS[".conll"], f"conll: every line is a word and its tag, not {suffix[1:]}"
    return READERS[suffix], ""
