"""One file that the user names, as a file that a reader can open: unpacked, or taken from stdin.

What is unpacked or comes through a pipe lies in a temporary directory, so that memory does not grow
with it; errors name what the user named.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import shutil
import sys
import tempfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ftlevel.data.sources.readers.files import READERS, describe_missing
from ftlevel.data.sources.streams import refuse_unreadable
from ftlevel.errors import InputError, listing

STDIN = "-"
_GZIP = b"\x1f\x8b"
_HEAD = 1 << 16  # bytes by which the format of stdin is told


@dataclass(frozen=True)
class OneFile:
    """A file of rows.

    Attributes:
        path: what a reader opens.
        shown: what the user calls it.
        note: how its format was told, where nobody said it.
    """

    path: Path
    shown: str
    note: str = ""


@contextlib.contextmanager
def opened_file(name: str, wish: str | None, columns: Collection[str]) -> Iterator[OneFile]:
    """Give the file called `name`; errors inside the block that name a copy of it name it instead.

    Args:
        name: a path, of which `.gz` is unpacked, or `-` for stdin.
        wish: the format, as a suffix without its dot; None goes by the name, or by the first bytes.
        columns: names by which the header of a table on stdin is known.

    Raises:
        InputError: it is not there, cannot be unpacked, or its format cannot be told.
    """
    path = Path(name).expanduser()
    packed = path.suffix.lower() == ".gz"
    if name != STDIN and not packed and wish is None:
        yield OneFile(path, name)
        return
    if name != STDIN and not path.exists():
        raise InputError(describe_missing(path))
    shown = "stdin" if name == STDIN else name
    with tempfile.TemporaryDirectory(prefix="ftlevel-rows-") as folder:
        if name == STDIN or packed:
            copy, note = _copy(path, name, wish, columns, Path(folder), shown)
        else:
            copy, note = Path(folder) / f"rows.{wish}", ""
            copy.symlink_to(path.resolve())
        try:
            yield OneFile(copy, shown, note)
        except InputError as error:
            if str(copy) not in str(error):
                raise
            raise InputError([p.replace(str(copy), shown) for p in error.problems]) from None


def _copy(
    path: Path, name: str, wish: str | None, columns: Collection[str], folder: Path, shown: str
) -> tuple[Path, str]:
    """Return an unpacked copy in `folder`, named by its format, and how that was told."""
    raw = folder / "raw"
    with contextlib.ExitStack() as held, refuse_unreadable(path):
        source = sys.stdin.buffer if name == STDIN else held.enter_context(path.open("rb"))
        with raw.open("wb") as file:
            shutil.copyfileobj(source, file)
    with raw.open("rb") as file:
        if file.read(2) == _GZIP:
            _unpack(raw, shown)
    suffix = path.with_suffix("").suffix.lower() if name != STDIN else ""
    note = ""
    if wish is not None:
        suffix = f".{wish}"
    elif name == STDIN:
        suffix, note = _tell_format(raw, columns)
    if suffix not in READERS:
        raise InputError(
            f"{shown}: cannot tell what is packed in it. Name it as in rows.csv.gz, or pass "
            f"--input-format, one of {listing(r[1:] for r in READERS)}."
        )
    return raw.rename(folder / f"rows{suffix}"), note


def _unpack(raw: Path, shown: str) -> None:
    """Put what is in the gzip file `raw` into its place."""
    plain = raw.with_name("plain")
    try:
        with gzip.open(raw, "rb") as source, plain.open("wb") as file:
            shutil.copyfileobj(source, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{shown}: cannot be unpacked ({error}). Was the download or copy cut short?"
        ) from None
    plain.replace(raw)


def _tell_format(raw: Path, columns: Collection[str]) -> tuple[str, str]:
    """Return the suffix of what stdin holds, and by what it was told.

    Raises:
        InputError: it could be several things.
    """
    with raw.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise InputError("stdin: has 0 rows (0 bytes). Pipe rows into it.")
    for begin, suffix in ((b"PAR1", ".parquet"), (b"ARROW1", ".arrow"), (b"\xff" * 4, ".arrow")):
        if head.startswith(begin):
            return suffix, "by its first bytes"
    text = _first_text(head)
    if text[:1] == "{":
        return ".jsonl", "it begins with an object"
    if text[:1] == "[":
        return ".json", "it begins with a list"
    line = text.splitlines()[0] if text else ""
    for separator, suffix in ((",", ".csv"), ("\t", ".tsv")):
        cells: list[str] = next(csv.reader([line], delimiter=separator), [])
        if any(cell in columns or cell.lower() in columns for cell in cells):
            return suffix, "its first line has names of columns"
    raise InputError(
        f"stdin: its first line, {line[:40]!r}, does not say what format it is. Pass "
        f"--input-format, one of {listing(suffix[1:] for suffix in READERS)}."
    )


def _first_text(head: bytes) -> str:
    return head.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
