"""Chunks of rows, the base class of file readers, and errors for unsupported input.

Unsupported are images, audio, video and documents.
"""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.table import BadRow, Row, Table, get_inconsistent_rows
from ftlevel.errors import InputError, did_you_mean, join_names

_SUFFIXES = {
    "an image": (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".svg"),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".opus"),
    "a video": (".mp4", ".avi", ".mov", ".mkv", ".webm"),
    "a document": (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".pptx"),
}
_MEDIA = {"images": "an image", "audio": "audio", "videos": "a video"}
_MEDIA_NAMES = {
    media_type: re.compile(rf"({names})s?(_?(bytes|data|file|file_?name|path|uri|url)s?)?", re.I)
    for media_type, names in {
        "images": "image|img|picture|photo|pixel_value",
        "audio": "audio|speech|waveform|input_feature|input_value",
        "videos": "video",
    }.items()
}
"""Patterns of media column names in published datasets, such as image, image_path or videos."""
_MAGIC = {
    "images": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*"),
    "audio": (b"ID3", b"fLaC", b"OggS", b"RIFF", b"\xff\xfb"),
    "videos": (b"\x1aE\xdf\xa3",),
}
_LONGEST_PATH = 2048
_ARCHIVES = {".zip": "unzip", ".tar": "tar xf", ".tgz": "tar xzf", ".7z": "7z x"}


def refuse_unknown(path: Path, suffix: str, readable: list[str]) -> InputError:
    """Returns the error for a file whose suffix is not in `readable`."""
    for name, suffixes in _SUFFIXES.items():
        if suffix in suffixes:
            remedy = "Use its text, such as captions or transcripts, as .jsonl or .csv."
            if name == "a document":
                remedy = "Extract its text first, as .txt or .jsonl."
            return InputError(f"{path}: is {name}, and ftlevel trains on text. {remedy}")
    if suffix in _ARCHIVES:
        return InputError(
            f"{path}: is an archive of files. Unpack it and name the directory: "
            f"{_ARCHIVES[suffix]} {shlex.quote(path.name)}"
        )
    remedy = "Convert it, or add --input-format."
    if suffix == ".xls":
        remedy = "Save the sheet as .xlsx or .csv."
    return InputError(
        f"{path}: cannot read {suffix or 'a file without extension'!r}. "
        f"Formats: {join_names(readable, 20)}. {remedy}"
    )


def media_of_name(column: str) -> str | None:
    """Returns "images", "audio" or "videos" if the column name says so; else None."""
    return next((k for k, names in _MEDIA_NAMES.items() if names.fullmatch(column)), None)


def refuse_media_columns(column_names: Sequence[str], rows: Sequence[Row], source: str) -> None:
    """Raise `InputError` for unused columns that hold images, audio or video.

    A column holds media if all of its first values are media (file names, URLs or content), or if
    it is named like media and one of its values may be media.
    """
    media = []
    for column in column_names:
        named = media_of_name(column)
        values = (row.get(column) for row in (rows if named else rows[:CHUNK_ROWS]))
        first = list(islice((v for v in values if v not in (None, "", [], {})), CHUNK_ROWS))
        types = [_media_of_value(value) for value in first]
        if first and all(types):
            media.append((column, named or str(types[0])))
        elif named and any(map(_may_be_media, first)):
            media.append((column, named))
    if media:
        raise InputError(describe_media(source, media))


def describe_media(source: str, column_names: Sequence[tuple[str, str]]) -> str:
    """Returns the error message for media columns, given as (column, media type)."""
    types = " and ".join(f"column {column!r} holds {type_}" for column, type_ in column_names)
    names = " ".join(shlex.quote(column) for column, _ in column_names)
    return (
        f"{source}: {types}, and ftlevel trains on text only. To leave "
        f"{'them' if len(column_names) > 1 else 'it'} out and use the other columns: "
        f"--ignore-columns {names}."
    )


def _media_of_value(value: Any) -> str | None:
    if isinstance(value, str):
        return _media_of_text(value)
    if isinstance(value, bytes):
        return next((k for k, magic in _MAGIC.items() if value.startswith(magic)), None)
    if isinstance(value, dict):
        items = [item for item in value.values() if isinstance(item, str | bytes)]
        types = filter(None, map(_media_of_value, items))
        return next(types, "files" if any(isinstance(v, bytes) for v in items) else None)
    if isinstance(value, list | tuple):
        item_types = [_media_of_value(item) for item in value if item is not None]
        return item_types[0] if item_types and all(item_types) else None
    return {"PIL": "images", "torchcodec": "videos"}.get(type(value).__module__.partition(".")[0])


def _media_of_text(text: str) -> str | None:
    if text.startswith("data:"):
        return next((k for k in _MEDIA if text[5:].startswith(k.removesuffix("s") + "/")), None)
    if len(text) > _LONGEST_PATH or "\n" in text:
        return None
    suffix = Path(re.split(r"[?#]", text, maxsplit=1)[0]).suffix.lower()
    return next((k for k, noun in _MEDIA.items() if suffix in _SUFFIXES[noun]), None)


def _may_be_media(value: Any) -> bool:
    if isinstance(value, str):  # a file name, an id or base64
        return _media_of_text(value) is not None or not any(map(str.isspace, value))
    return not isinstance(value, bool | int | float)


def check_is_file(path: Path, data_files: Callable[[Path], list[str]]) -> None:
    """Raise `InputError` unless `path` is a file; the message lists a directory's `data_files`."""
    if path.is_dir():
        names = data_files(path)
        listing = f"Files in it: {join_names(names)}." if names else "It holds no data file."
        raise InputError(f"{path}: is a directory, not a file. {listing} Name one file.")
    if not path.exists():
        raise InputError(describe_missing(path))
    if not path.is_file():
        raise InputError(f"{path}: is a device or a socket, not a file of rows. Name a file.")


def _describe_link(path: Path) -> str:
    try:
        path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) or error.errno != 2:
            return "is a symbolic link that leads back to itself. Name the file."
    return f"is a symbolic link to {path.readlink()}, which is not there. Name the file."


def describe_missing(path: Path) -> str:
    """Returns the error message for a missing path, with similar names in the directory."""
    folder = path.parent
    if path.is_symlink():
        return f"{path}: {_describe_link(path)}"
    if str(folder) in ("/dev/fd", "/proc/self/fd"):
        return (
            f"{path}: was a shell pipe such as <(…), whose rows are no longer available. Pass it "
            "again with --dataset <(…), or use a file with the same rows."
        )
    if not folder.is_dir():
        return f"{path}: no such file, and no directory {folder}. Check the path."
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    directory = "the current directory" if str(folder) == "." else str(folder)
    listing = f"In {directory}: {join_names(names, 8) or 'no files'}."
    return f"{path}: no such file.{did_you_mean(path.name, names)} {listing}"


@dataclass
class Chunk:
    """Consecutive rows of a file with line (or row) numbers; `errors` are the unreadable rows.

    `end` is the byte after the chunk; None in files without lines.
    """

    rows: list[Row] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    errors: list[BadRow] = field(default_factory=list)
    end: int | None = None

    def add(self, line: int, row: Any, fault: str = "") -> None:
        """Add `row`, or a `BadRow` with the message `fault` if that is not ""."""
        if fault:
            self.errors.append(BadRow(line, fault))
        else:
            self.rows.append(row)
            self.lines.append(line)


class Reader(ABC):
    """Base of the readers of file formats. The constructor validates the file and reads no rows.

    Attributes:
        uniform: whether the format guarantees the same keys and types in all rows.
        text_cells: whether cells are text only, as in CSV; lists and objects are then JSON text.
        shown: file name in messages; `path` may be a decompressed copy.
        null_keys: number of keys with value null that were dropped so far, by path.
        ignored: columns of the schema that are not read.
    """

    unit: Literal["line", "row"] = "line"
    uniform: ClassVar[bool] = False
    text_cells: ClassVar[bool] = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label_names: Mapping[str, tuple[str, ...]] = {}
        self.schema: Any = None
        self.shown = str(path)
        self.notes: list[str] = []
        self.null_keys: Counter[str] = Counter()
        self.ignored: tuple[str, ...] = ()

    @abstractmethod
    def read(self) -> Iterator[Chunk]:
        """Yields the rows in chunks."""

    def chunks(self) -> Iterator[Chunk]:
        """Yields the rows in chunks; raises `InputError` if the file is corrupted."""
        with wrap_read_errors(self.path, self.shown):
            yield from self.read()

    def share(self, chunk: Chunk) -> float | None:
        """Returns the fraction of the file read up to the end of `chunk`, or None if unknown."""
        size = self.path.stat().st_size
        return min(1.0, chunk.end / size) if size and chunk.end is not None else None

    def collect(self) -> tuple[Table, list[BadRow]]:
        """Returns all rows as a table, and a `BadRow` for each invalid or inconsistent row."""
        rows: list[Row] = []
        lines: list[int] = []
        errors: list[BadRow] = []
        for chunk in self.chunks():
            rows += chunk.rows
            lines += chunk.lines
            errors += chunk.errors
        odd = [] if self.uniform else get_inconsistent_rows(rows, lines)
        return self.table(rows, lines), [*errors, *odd]

    def table(self, rows: Sequence[Row], lines: Sequence[int]) -> Table:
        """Returns a table of rows of this file."""
        return Table(
            rows,
            lines,
            self.shown,
            self.unit,
            label_names=self.label_names,
            notes=(*self.notes, *describe_null_keys(self.null_keys, self.shown)),
            text_cells=self.text_cells,
            ignored=self.ignored,
        )


@contextmanager
def wrap_read_errors(path: Path, shown: str = "") -> Iterator[None]:
    """In the `with` block, convert `OSError` to `InputError`, and `path` to `shown` in messages."""
    shown = shown or str(path)
    try:
        yield
    except OSError as error:
        raise InputError(f"{shown}: cannot be read ({error.strerror or error}).") from error
    except InputError as error:
        if str(path) == shown:
            raise
        raise InputError([p.replace(str(path), shown) for p in error.problems]) from None


def describe_null_keys(null_keys: Counter[str], source: str) -> list[str]:
    """Returns a note on the dropped keys with value null; empty if there are none."""
    if not null_keys:
        return []
    inner_first = sorted(null_keys, key=lambda path: (-path.count("."), path))
    return [
        f"{source}: dropped {null_keys.total():,} null keys of objects in lists, as Arrow gives "
        f"all objects of a list the same keys ({join_names(inner_first, 4)}); JSON Lines keeps "
        "nulls"
    ]
