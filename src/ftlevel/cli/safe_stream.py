"""A text stream that keeps working after its reader is gone. It must not import rich."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any, TextIO


class SafeStream(io.TextIOBase):
    """Text stream that drops further output once `stream` fails, with one note on stderr."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._try("flush")

    def has_reader(self) -> bool:
        """Return whether the other end of a pipe is still open."""
        if self._stream is None:
            return False
        try:
            poll = select.poll()
            poll.register(self._stream.fileno(), 0)  # errors only; they are always reported
            return not any(event & select.POLLERR for _, event in poll.poll(0))
        except (AttributeError, OSError, ValueError):  # Windows; not a file
            return True

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """Return the file descriptor, from which rich reads the terminal's size."""
        if self._stream is None:
            raise OSError("the stream is closed")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding, from which rich chooses the characters of its bars."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def _try(self, method: str, *arguments: Any) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except UnicodeEncodeError:  # the terminal's encoding lacks a character
            replaced = arguments[0].encode(self.encoding, "replace").decode(self.encoding)
            self._stream.write(replaced)
        except OSError as error:
            stream, self._stream = self._stream, None
            discard(stream)
            if stream is not sys.stderr and sys.stderr is not None:
                reason = error.strerror or type(error).__name__
                sys.stderr.write(f"ftlevel: nothing more is shown ({reason}); the work goes on.\n")


def discard(stream: TextIO) -> None:
    """Redirect `stream` to the null device, so that Python does not fail to flush it at exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # not a file, as in tests
        pass
