"""Random access to rows of large JSON Lines files, and local copies of compressed files and pipes.

Compressed files, stdin and pipes are copied to a temporary directory of the process, so that every
reader can seek. `LineRows` stores the byte offset of every 64th line and decodes rows on access.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import json
import lzma
import os
import shutil
import sys
import tempfile
import time
import weakref
import zlib
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from ftlevel.artifacts.files import Workspace
from ftlevel.errors import InputError
from ftlevel.safe_io import open_new

STDIN = "-"
WRITER_SECONDS = 30.0
"""Seconds to wait for a program to open a pipe for writing."""
_MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
PACKED = tuple(_MAGIC)
"""Suffixes of compressed files."""


def is_compressed(path: Path) -> bool:
    """Returns whether `path` has the suffix of a compressed file."""
    return path.suffix.lower() in PACKED


def plain_name(name: str) -> str:
    """Returns a file's `name` without its compression suffix, such as .gz."""
    path = Path(name)
    return path.stem if is_compressed(path) else name


def decompress(path: Path) -> Path:
    """Returns a decompressed copy of a file, cached until its size or modification time changes.

    Raises `InputError` for truncated or wrongly named content, and for a full disk.
    """
    stat = path.stat()
    key = (path, path.suffix.lower(), (stat.st_mtime_ns, stat.st_size))
    if not _unpack(*key).exists():  # the temporary directory was cleaned
        _unpack.cache_clear()
    return _unpack(*key)


@functools.cache
def _unpack(path: Path, suffix: str, _state: tuple[int, int]) -> Path:
    with path.open("rb") as file:
        if not file.read(8).startswith(_MAGIC[suffix]):
            raise InputError(
                f"{path}: is named {suffix} and does not begin like one. Was it unpacked already, "
                "or the download an error page?"
            )
    copy = _create_directory() / plain_name(path.name)
    _write_copy(lambda: _openers()[suffix](path), copy, str(path))
    return copy


_stdin: tuple[object, Path] | None = None  # the stdin object and its copy


def cache_stdin() -> Path:
    """Returns a file with the decompressed content of stdin; later calls return the same file.

    Raises `InputError` if stdin is a terminal, empty or truncated.
    """
    global _stdin
    if _stdin is None or _stdin[0] is not sys.stdin:
        if sys.stdin is None or getattr(sys.stdin, "isatty", bool)():
            raise InputError("stdin is a terminal, where rows are expected. Pipe a file into it.")
        _stdin = sys.stdin, _copy_rows(lambda: sys.stdin.buffer, "stdin", "stdin")
    return _stdin[1]


def is_pipe(path: Path) -> bool:
    """Returns whether `path` is a FIFO, as in the shell's `<(…)`."""
    try:
        return path.is_fifo()
    except OSError:
        return False


def cache_pipe(path: Path) -> Path:
    """Returns a file with the decompressed content of a pipe; later calls return the same file.

    Raises `InputError` if no program writes to the pipe, or the data is truncated.
    """
    state, copy = _pipes.get(path, (None, path))
    if state != _pipe_state(path):
        copy = _copy_rows(lambda: _PipeBytes(path), plain_name(path.name), str(path))
        _pipes[path] = (_pipe_state(path), copy)
    return copy


_pipes: dict[Path, tuple[object, Path]] = {}  # state after reading, and the copy


def _pipe_state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


class _PipeBytes:
    """Reader of a pipe; raises `InputError` if no program writes within `WRITER_SECONDS`."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        first, deadline = b"", time.monotonic() + WRITER_SECONDS
        with contextlib.suppress(BlockingIOError):  # opened for writing, but still empty
            while not (first := os.read(self._file, 1 << 16)):
                if time.monotonic() > deadline:
                    os.close(self._file)
                    raise InputError(
                        f"{path}: is a pipe to which no program has written in {WRITER_SECONDS:g} "
                        "seconds. Start the program that writes the rows, or name a file."
                    )
                time.sleep(0.05)
        self._first = first
        os.set_blocking(self._file, True)

    def read(self, size: int) -> bytes:
        content, self._first = self._first or os.read(self._file, size), b""
        if not content:
            os.close(self._file)
        return content


def _copy_rows(get_source: Callable[[], Any], name: str, shown: str) -> Path:
    raw = _create_directory() / name
    _write_copy(get_source, raw, shown)
    with raw.open("rb") as file:
        head = file.read(8)
    if not head:
        raise InputError(f"{shown}: has 0 rows (0 bytes). Pipe rows into it.")
    suffix = next((suffix for suffix, magic in _MAGIC.items() if head.startswith(magic)), None)
    if suffix is None:
        return raw
    copy = _create_directory() / name
    _write_copy(lambda: _openers()[suffix](raw), copy, shown)
    raw.unlink()
    return copy


def _openers() -> dict[str, Callable[[Path], Any]]:
    import pyarrow as pa  # type: ignore[import-untyped]

    def open_zst(path: Path) -> Any:
        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")

    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zst}


def _create_directory() -> Path:
    if not Path(_workspace().name).is_dir():
        _workspace.cache_clear()
    return Path(tempfile.mkdtemp(dir=_workspace().name))


@functools.cache
def _workspace() -> Workspace:
    return Workspace("rows")


def _write_copy(get_source: Callable[[], Any], copy: Path, shown: str) -> None:
    with open_new(copy, "wb") as file:
        try:
            shutil.copyfileobj(get_source(), file, 1 << 20)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            full = isinstance(error, OSError) and error.errno == 28
            copy.unlink()
            raise InputError(
                f"{shown}: not enough space to unpack it in {copy.parent.parent.parent}. Free "
                f"some, or set TMPDIR to another directory."
                if full
                else f"{shown}: cannot be unpacked ({str(error).rstrip('.')}). "
                "Was the download or copy cut short?"
            ) from None


T = TypeVar("T")


class LazySequence(Sequence[T]):
    """Base of sequences that compute their items on access, by `_item`; a slice returns a list."""

    @abstractmethod
    def _item(self, at: int) -> T:
        """Returns the item at the 0-based index `at`."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        at = range(len(self))[index]
        return self._item(at) if isinstance(at, int) else [self._item(i) for i in at]


class RowView(LazySequence[T]):
    """Lazy sequence with one item for each of its `rows`."""

    rows: Sequence[Any]

    def __len__(self) -> int:
        return len(self.rows)


Row = dict[str, Any]
CHUNK_ROWS = 64
"""Number of rows (or lines) per chunk."""
LARGE_BYTES = 1_000_000
"""File size in bytes from which rows are read on access instead of kept in memory."""
_BLOCK = 1 << 16  # bytes per read
_raw_decode = json.JSONDecoder().raw_decode


def as_row(value: Any) -> Any:
    """Returns the dict of a [text, dict] pair (of spaCy) with the text added; else `value`."""
    if type(value) is list and len(value) == 2:
        text, columns = value
        if type(text) is str and type(columns) is dict and "text" not in columns:
            return {"text": text, **columns}
    return value


class LineNumbers(LazySequence[int]):
    """1-based line numbers of the rows of a file; compact: only lines without a row are stored."""

    def __init__(self) -> None:
        self._last = 0
        self._gaps = array("q")  # for each line without a row: number of rows before it + 1

    def append(self, line: int) -> None:
        """Add the line of a row; lines must increase."""
        for missing in range(self._last + 1, line):
            self._gaps.append(missing - len(self._gaps))
        self._last = line

    def __len__(self) -> int:
        return self._last - len(self._gaps)

    def __iter__(self) -> Iterator[int]:
        start = 1
        for before, gap in enumerate(self._gaps):
            yield from range(start + before, gap + before)
            start = gap
        yield from range(start + len(self._gaps), self._last + 1)

    def _item(self, at: int) -> int:
        return at + 1 + bisect_right(self._gaps, at + 1)


class LineRows(LazySequence[Row]):
    """Rows of a JSON Lines file, decoded on access; the file must not change meanwhile.

    `lines` are the 1-based line numbers of the rows. `offsets` are the byte offsets of lines 1, 65,
    129 and so on.
    """

    def __init__(self, path: Path, lines: Sequence[int], offsets: Sequence[int]) -> None:
        self.path, self.lines, self.offsets = path, lines, offsets
        self._next = (1, offsets[0]) if offsets else (1, 0)  # next line and its byte offset
        self._block, self._at = b"", 0  # the bytes read last, and their offset
        # No mmap: if the file is truncated meanwhile, access raises SIGBUS.
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self.lines)

    def _item(self, at: int) -> Row:
        return self._read(self.lines[at])

    def __iter__(self) -> Iterator[Row]:
        return map(self._read, self.lines)

    def _read(self, line: int) -> Row:
        at, start = self._next
        if not 0 <= line - at < CHUNK_ROWS:
            at, start = line - (line - 1) % CHUNK_ROWS, self.offsets[(line - 1) // CHUNK_ROWS]
        while at < line:
            start = self._end(start) + 1
            at += 1
        end = self._end(start)
        self._next = (line + 1, end + 1)
        text = self._block[start - self._at : end - self._at].decode(errors="replace")
        try:
            row = as_row(_raw_decode(text.lstrip())[0])
        except ValueError:
            row = None
        if type(row) is not dict:
            raise InputError(f"{self.path}:{line}: changed while it was read. Run again.")
        return row

    def _end(self, start: int) -> int:
        end = self._block.find(b"\n", start - self._at) if start >= self._at else -1
        size = _BLOCK
        while end < 0:
            self._block, self._at = os.pread(self._file, size, start), start
            end = self._block.find(b"\n")
            if end < 0 and len(self._block) < size:  # the last line may lack a newline
                end = len(self._block)
            size *= 2
        return self._at + end

    def take(self, indices: Iterable[int]) -> LineRows:
        """Returns the rows at `indices`, decoded on access; each needs eight bytes of memory."""
        return LineRows(self.path, array("q", (self.lines[i] for i in indices)), self.offsets)
