"""A stream that outlives its reader: what is shown must not end a run that is worth hours."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any, TextIO


class Lasting(io.TextIOBase):
    """Writes to `stream` for as long as somebody takes it, and then drops what is written.

    `ftlevel train … | head`, a terminal that is closed or a log on a full disk lose the rest of the
    display, which is said once on stderr, and nothing else.

    Args:
        stream: where to; None where the process was started without it.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        self._try("flush")

    def has_reader(self) -> bool:
        """Whether somebody may still read: False once the other end of a pipe is closed."""
        if self._stream is None:
            return False
        try:
            poll = select.poll()
            poll.register(self._stream.fileno(), 0)  # errors alone, which are always reported
            return not any(event & select.POLLERR for _, event in poll.poll(0))
        except (AttributeError, OSError, ValueError):  # Windows; not a file
            return True

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor, which rich asks for the terminal's size."""
        if self._stream is None:
            raise OSError("the stream is closed")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding, by which rich chooses the characters of its bars."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def _try(self, method: str, *arguments: Any) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except UnicodeEncodeError:  # a terminal that has no such letters
            replaced = arguments[0].encode(self.encoding, "replace").decode(self.encoding)
            self._stream.write(replaced)
        except OSError as error:
            stream, self._stream = self._stream, None
            discard(stream)
            if stream is not sys.stderr and sys.stderr is not None:
                reason = error.strerror or type(error).__name__
                sys.stderr.write(f"ftlevel: nothing more is shown ({reason}); the work goes on.\n")


def discard(stream: TextIO) -> None:
    """Let what is still in the buffer of `stream` go nowhere, or Python complains at its exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # not a file, as in tests
        pass
