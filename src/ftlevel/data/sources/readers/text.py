"""The lines of a UTF-8 file, counted in lines and bytes, and what is no UTF-8 by both."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from shlex import quote

from ftlevel.data.sources.streams import Cursor
from ftlevel.errors import InputError

_BLOCK = 1 << 13  # bytes that are decoded at once; a fault within them comes before any other
_BOM = b"\xef\xbb\xbf"


class TextLines:
    """The lines of a file from a byte on, with or without a byte order mark before the first.

    Args:
        path: the file.
        at: the byte to begin at.
        line: how many lines lie before it.
        universal: whether a carriage return alone ends a line too, as in CSV.
    """

    def __init__(self, path: Path, at: int = 0, line: int = 0, *, universal: bool = False) -> None:
        self.path, self._universal = path, universal
        self._at, self._line = at, line  # where the block begins
        self._block: list[bytes] = []

    def cursor(self, line: int) -> Cursor:
        """Return the place behind `line`, which must be the line that was taken last.

        The arguments of `TextLines` to go on with.
        """
        passed = self._block[: line - self._line]
        return {"at": self._at + sum(map(len, passed)), "line": line}

    def __iter__(self) -> Iterator[str]:
        """Yield the lines with their ends.

        Raises:
            InputError: a line is not UTF-8.
        """
        return chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[Iterator[str]]:
        with self.path.open("rb") as file:
            if not self._at and file.read(len(_BOM)) == _BOM:
                self._at = len(_BOM)
            file.seek(self._at)
            while block := file.readlines(_BLOCK):
                content = b"".join(block)
                _decode(self.path, content, self._at, self._line)
                if self._universal and b"\r" in content:
                    block = content.splitlines(keepends=True)
                self._block = block
                # One by one: texts that are dropped at once leave no gaps between those kept.
                yield map(bytes.decode, block)
                self._at += len(content)
                self._line += len(block)
                self._block = []


def read_text(path: Path) -> str:
    """Return the whole of a file, without a byte order mark.

    Raises:
        InputError: it is not UTF-8.
    """
    return _decode(path, path.read_bytes(), 0, 0).removeprefix("\ufeff")


def _decode(path: Path, content: bytes, at: int, line: int) -> str:
    """Return `content` decoded.

    Args:
        path: the file.
        content: of the file, some lines from byte `at` on.
        at: as of `TextLines`.
        line: as of `TextLines`.

    Raises:
        InputError: naming its first byte that is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start) + 1
        byte = f"(byte 0x{content[error.start]:02x} at offset {at + error.start:,})"
        raise InputError(
            f"{path}:{line}: the file ends inside a character {byte}: "
            "was the download or copy cut short? Fetch it again."
            if error.reason == "unexpected end of data"
            else f"{path}:{line}: not UTF-8 {byte}. If it is Latin-1: "
            f"iconv -f LATIN1 -t UTF-8 {quote(path.name)} > {quote(f'utf8-{path.name}')}"
        ) from None


def check_head(path: Path) -> None:
    """Refuse a text file that begins as something else does.

    Raises:
        InputError: it does.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _looks_like_utf16(head):
        raise InputError(
            f"{path}:1: looks like UTF-16, not UTF-8 (byte 0x{head[0]:02x} at offset 0). "
            f"Convert it: iconv -f UTF-16 -t UTF-8 {quote(path.name)} > "
            f"{quote(f'utf8-{path.name}')}"
        )
    if head.startswith(b"\x1f\x8b"):
        raise InputError(f"{path}: is compressed by gzip. Name it {path.name}.gz.")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: is a Git LFS pointer, not the data. Fetch the data: git lfs pull"
        )


def _looks_like_utf16(head: bytes) -> bool:
    """Tell whether every other byte is zero, as in Latin text of UTF-16 without a mark."""
    return len(head) > 3 and max(head[::2].count(0), head[1::2].count(0)) > 0.4 * len(head)
