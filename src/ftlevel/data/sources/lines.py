"""Compressed files, stdin and pipes as plain files, in a temporary directory of the process.

So every format can be read from them, streamed and gone back to, and memory does not grow with
them. A file is unpacked once for as long as it does not change.

A sequence whose items are made when they are asked for.

Rows of a JSON Lines file, read again when they are asked for: nothing is held for a row.

What is kept is the place of every 64th line, and the number of each line that is no row.
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

from ftlevel.errors import InputError
from ftlevel.workspace import Workspace

STDIN = "-"
WRITER_SECONDS = 30.0
"""How long a pipe is waited for that no program has opened for writing."""
_MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
PACKED = tuple(_MAGIC)
"""Suffixes of what is unpacked."""


def is_packed(path: Path) -> bool:
    """Tell whether the name of `path` ends as that of a compressed file."""
    return path.suffix.lower() in PACKED


def plain_name(name: str) -> str:
    """Return a file's name without the suffix of what it is compressed by."""
    path = Path(name)
    return path.stem if is_packed(path) else name


def unpack(path: Path) -> Path:
    """Return an unpacked copy of a compressed file; its name has the suffix of what was packed.

    Raises:
        InputError: it is not what its name says, or is cut short, or there is no room.
    """
    facts = path.stat()
    wish = (path, path.suffix.lower(), (facts.st_mtime_ns, facts.st_size))
    copy = _unpack(*wish)
    if not copy.exists():  # somebody cleaned the directory for temporary files
        _unpack.cache_clear()
        copy = _unpack(*wish)
    return copy


@functools.cache
def _unpack(path: Path, suffix: str, _state: tuple[int, int]) -> Path:
    with path.open("rb") as file:
        if not file.read(8).startswith(_MAGIC[suffix]):
            raise InputError(
                f"{path}: is named {suffix} and does not begin like one. Was it unpacked already, "
                "or the download an error page?"
            )
    copy = _new_folder() / plain_name(path.name)
    _write_copy(lambda: _openers()[suffix](path), copy, str(path))
    return copy


_kept: list[tuple[object, Path]] = []  # the stdin that was read, and its copy


def keep_stdin() -> Path:
    """Return what came through stdin as a file, unpacked; the second time the same file.

    Raises:
        InputError: nothing is piped, or it is cut short.
    """
    for stream, copy in _kept:
        if stream is sys.stdin:
            return copy
    copy = _copy_stdin()
    _kept[:] = [(sys.stdin, copy)]
    return copy


def _copy_stdin() -> Path:
    if sys.stdin is None or getattr(sys.stdin, "isatty", bool)():
        raise InputError("stdin is a terminal, where rows are expected. Pipe a file into it.")
    return _keep(lambda: sys.stdin.buffer, "stdin", "stdin")


def is_pipe(path: Path) -> bool:
    """Tell whether `path` is a pipe with a name: a FIFO, or what a shell makes of `<(…)`."""
    try:
        return path.is_fifo()
    except OSError:
        return False


def keep_pipe(path: Path) -> Path:
    """Return what came through the pipe `path` as a file, unpacked; the second time the same file.

    Raises:
        InputError: no program writes to it, or it is cut short.
    """
    state, copy = _pipes.get(path, (None, path))
    if state != _state_of(path):
        copy = _keep(lambda: _PipeBytes(path), plain_name(path.name), str(path))
        _pipes[path] = (_state_of(path), copy)
    return copy


_pipes: dict[Path, tuple[object, Path]] = {}  # its state after it was read, and the copy


def _state_of(path: Path) -> tuple[int, int, int]:
    """Return what tells a pipe from another one of the same name."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns


class _PipeBytes:
    """The bytes of a pipe, once a program has opened it for writing.

    Raises:
        InputError: none does so in `WRITER_SECONDS`.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        first, deadline = b"", time.monotonic() + WRITER_SECONDS
        with contextlib.suppress(BlockingIOError):  # somebody writes, and has not begun
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
        """Return the next bytes; none at the end."""
        first, self._first = self._first, b""
        found = first or os.read(self._file, size)
        if not found:
            os.close(self._file)
        return found


def _keep(open_source: Callable[[], Any], name: str, shown: str) -> Path:
    """Return a file called `name` with all of a source, unpacked if its first bytes say so."""
    raw = _new_folder() / name
    _write_copy(open_source, raw, shown)
    with raw.open("rb") as file:
        head = file.read(8)
    if not head:
        raise InputError(f"{shown}: has 0 rows (0 bytes). Pipe rows into it.")
    suffix = next((suffix for suffix, magic in _MAGIC.items() if head.startswith(magic)), None)
    if suffix is None:
        return raw
    plain = _new_folder() / name
    _write_copy(lambda: _openers()[suffix](raw), plain, shown)
    raw.unlink()
    return plain


def _openers() -> dict[str, Callable[[Path], Any]]:
    """Return what opens each kind of compressed file for reading."""
    import pyarrow as pa  # type: ignore[import-untyped]

    def open_zst(path: Path) -> Any:
        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")

    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zst}


def _new_folder() -> Path:
    if not Path(_root().name).is_dir():
        _root.cache_clear()
    return Path(tempfile.mkdtemp(dir=_root().name))


@functools.cache
def _root() -> Workspace:
    return Workspace("rows")


def _write_copy(open_source: Callable[[], Any], copy: Path, shown: str) -> None:
    """Write all of a source to `copy`.

    Raises:
        InputError: it cannot be read to its end, or there is no room for the copy.
    """
    with copy.open("wb") as file:
        try:
            shutil.copyfileobj(open_source(), file, 1 << 20)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            full = isinstance(error, OSError) and error.errno == 28
            copy.unlink()
            raise InputError(
                f"{shown}: no room to unpack it in {copy.parent.parent.parent}. Make room there, "
                "or name a larger place: TMPDIR=…"
                if full
                else f"{shown}: cannot be unpacked ({str(error).rstrip('.')}). "
                "Was the download or copy cut short?"
            ) from None


T = TypeVar("T")


class Computed(Sequence[T]):
    """A sequence by its length and `_item`; several items are a list."""

    @abstractmethod
    def _item(self, at: int) -> T:
        """Return the item at `at`, from 0."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        """Return an item, or several as a list."""
        chosen = range(len(self))[index]
        return self._item(chosen) if isinstance(chosen, int) else [self._item(i) for i in chosen]


Row = dict[str, Any]
PART = 64
"""Lines, or rows, that are read and encoded together; the place of each part of a file is kept."""
LARGE_BYTES = 1_000_000
"""Size from which on the rows of a file are not held in memory."""
_BLOCK = 1 << 16  # bytes that are read at once
_raw_decode = json.JSONDecoder().raw_decode


def as_row(value: Any) -> Any:
    """Return a pair such as spaCy's `["text", {"entities": […]}]` as an object; else the value."""
    if type(value) is list and len(value) == 2:
        text, more = value
        if type(text) is str and type(more) is dict and "text" not in more:
            return {"text": text, **more}
    return value


class LineNumbers(Computed[int]):
    """The lines of a file that are rows, by what is missing: memory does not grow with the rows."""

    def __init__(self) -> None:
        self._last = 0
        self._gaps = array("q")  # of each line that is no row: the rows before it, plus one

    def append(self, line: int) -> None:
        """Add a row; lines only grow."""
        for missing in range(self._last + 1, line):
            self._gaps.append(missing - len(self._gaps))
        self._last = line

    def __len__(self) -> int:
        return self._last - len(self._gaps)

    def __iter__(self) -> Iterator[int]:
        """Yield the lines of all rows."""
        begin = 1
        for before, gap in enumerate(self._gaps):
            yield from range(begin + before, gap + before)
            begin = gap
        yield from range(begin + len(self._gaps), self._last + 1)

    def _item(self, at: int) -> int:
        return at + 1 + bisect_right(self._gaps, at + 1)


class LineRows(Computed[Row]):
    """Rows by the number of their lines; the lines were found to be good before.

    Args:
        path: of the file, which must not change meanwhile.
        lines: the 1-based line of each row.
        places: in bytes, of line 1, 65, 129 and so on: the cursors of the file's chunks.
    """

    def __init__(self, path: Path, lines: Sequence[int], places: Sequence[int]) -> None:
        self.path, self.lines, self.places = path, lines, places
        self._next = (1, places[0]) if places else (1, 0)  # the line after the last one read
        self._block, self._at = b"", 0  # bytes that were read, and where they begin
        # Not a mapping: a file that is cut meanwhile would end the process by a signal.
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self.lines)

    def _item(self, at: int) -> Row:
        return self._read(self.lines[at])

    def __iter__(self) -> Iterator[Row]:
        """Decode one row after another."""
        return map(self._read, self.lines)

    def _read(self, line: int) -> Row:
        at, begin = self._next
        if not 0 <= line - at < PART:
            at, begin = line - (line - 1) % PART, self.places[(line - 1) // PART]
        while at < line:
            begin = self._end(begin) + 1
            at += 1
        end = self._end(begin)
        self._next = (line + 1, end + 1)
        text = self._block[begin - self._at : end - self._at].decode(errors="replace")
        try:
            row = as_row(_raw_decode(text.lstrip())[0])
        except ValueError:
            row = None
        if type(row) is not dict:
            raise InputError(f"{self.path}:{line}: changed while it was read. Run again.")
        return row

    def _end(self, begin: int) -> int:
        """Return where the line ends that begins at `begin`, which is in the block afterwards."""
        found = self._block.find(b"\n", begin - self._at) if begin >= self._at else -1
        size = _BLOCK
        while found < 0:
            self._block, self._at = os.pread(self._file, size, begin), begin
            found = self._block.find(b"\n")
            if found < 0 and len(self._block) < size:  # the last line may lack its end
                found = len(self._block)
            size *= 2
        return self._at + found

    def take(self, indices: Iterable[int]) -> LineRows:
        """Return the rows at `indices`, of the same file, for eight bytes a row."""
        return LineRows(self.path, array("q", (self.lines[i] for i in indices)), self.places)
