"""Process setup for the import of torch: signals, garbage collector, malloc, loggers.

The cycle collector is disabled for imports: scanning half a million permanent objects takes a fifth
of the time to the first step. glibc gives every thread its own heap: with two shared heaps,
runs need 15 to 35 % less memory (docs/performance.md); with one, threads wait for its lock.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

from ftlevel.safe_io import escape_controls

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_SOON = 0.05  # seconds until the signal is sent again
_received_signal: int | None = None
_exit_immediately = False
_on_interrupt: Callable[[], int] | None = None


def install_signal_handlers(on_interrupt: Callable[[], int]) -> None:
    """Handle SIGTERM and SIGHUP like Ctrl-C; ignore SIGUSR1, which is for training runs.

    `on_interrupt` returns the exit code for a signal that has to end the process at once.
    """
    global _on_interrupt
    _on_interrupt = on_interrupt
    sys.unraisablehook = _resend_signal
    for name in _NAMES:
        if (number := getattr(signal, name, None)) is not None and (
            signal.getsignal(number) is not signal.SIG_IGN  # set by nohup
        ):
            signal.signal(number, _end)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, _ignore)


@contextlib.contextmanager
def exit_on_signal() -> Iterator[None]:
    """Context manager in which a signal ends the process at once.

    For imports, during which libraries turn KeyboardInterrupt into other errors.
    """
    global _exit_immediately
    before, _exit_immediately = _exit_immediately, True
    try:
        yield
    finally:
        _exit_immediately = before


def received_signal() -> bool:
    """Returns whether SIGINT, SIGTERM or SIGHUP came, even if a library caught the exception."""
    return _received_signal is not None


def exit_code() -> int:
    """Returns the exit code of an interrupted command: 130, or 143 for SIGTERM."""
    return 128 + (_received_signal or signal.SIGINT)


def protect_exit(code: int) -> None:
    """During exit, ignore the first signal, so that cleanup ends; the second exits with `code`."""
    seen: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            os._exit(code)

    for name in _NAMES:
        if (known := getattr(signal, name, None)) is not None and (signal.getsignal(known) is _end):
            signal.signal(known, end)


def _resend_signal(unraisable: Any) -> None:
    """Send the last signal again if Python dropped its KeyboardInterrupt, as in `__del__`."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt) and _received_signal is not None:
        import threading  # lazy: takes milliseconds

        timer = threading.Timer(_SOON, os.kill, (os.getpid(), _received_signal))
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


def _ignore(_: int, __: FrameType | None) -> None:
    """Signal handler that does nothing; SIG_IGN would look as if the caller ignored the signal."""


def _end(number: int, _: FrameType | None) -> None:
    global _received_signal
    _received_signal = number
    if _exit_immediately and _on_interrupt is not None:
        os._exit(_on_interrupt())
    raise KeyboardInterrupt


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Context manager for imports: garbage collection is off, and later skips imported objects.

    A signal ends the process at once. The collector is unchanged if torch is imported already.
    """
    with exit_on_signal():
        if "torch" in sys.modules or not gc.isenabled():
            yield
            return
        gc.disable()
        try:
            yield
            gc.freeze()
            atexit.register(_thaw)
        finally:
            gc.enable()


def _thaw() -> None:
    """Undo `gc.freeze` at exit if Triton is loaded, which would report frozen objects as leaks."""
    if "triton" in sys.modules:
        gc.unfreeze()


NUM_ARENAS = 2
"""Number of malloc arenas."""

TRIM_BYTES = 128 << 20
"""Free bytes at the top of the heap that are not returned to the kernel."""

MMAP_BYTES = 32 << 20
"""Minimum bytes of separately mapped tensors; the maximum that glibc allows."""

# Parameters of mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8

_MALLOC_VARIABLES = ("MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def limit_malloc_arenas() -> bool:
    """Limit glibc's malloc to `NUM_ARENAS` arenas for new threads; return whether that worked.

    False without glibc, or if environment variables configure or replace malloc.
    """
    is_configured = any(
        os.environ.get(name) for name in (*_MALLOC_VARIABLES, "GLIBC_TUNABLES", "LD_PRELOAD")
    )
    if is_configured or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    mallopt_values = (
        (_ARENA_MAX, NUM_ARENAS),
        (_TRIM_THRESHOLD, TRIM_BYTES),
        (_MMAP_THRESHOLD, MMAP_BYTES),
    )
    results = [libc.mallopt(name, value) for name, value in mallopt_values]
    return results == [1] * len(mallopt_values)


NOISY = ("bitsandbytes.backends.cpu.ops", "kernels", "torchao", "torch.utils._pytree")
"""Loggers that report missing optional kernels and deprecations at import."""


def silence_loggers() -> None:
    """Silence the messages that libraries log when they are imported."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def prepare() -> None:
    """Set up a process that trains a run: silence loggers, and limit malloc's arenas."""
    silence_loggers()
    limit_malloc_arenas()


silence_loggers()  # a multiprocessing server imports this module before the libraries


class EscapedStream:
    """Text stream that writes control characters, which may be a stranger's, as escapes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write `text` with control characters as escapes."""
        self.stream.write(escape_controls(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def escape_output() -> None:
    """Make `sys.stdout` and `sys.stderr` escaped streams, for all that this process prints."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, EscapedStream):
            setattr(sys, name, EscapedStream(stream))


def raw_stream(stream: Any) -> Any:
    """Returns the stream in which an escaped `stream` writes, for colors and progress bars."""
    return stream.stream if isinstance(stream, EscapedStream) else stream


def echo_styled(text: str, *, nl: bool = True, err: bool = False, **style: Any) -> None:
    """Print escaped `text` in a style of `typer.secho`, if the stream is a terminal."""
    import typer  # lazy: a multiprocessing server imports this module

    stream = raw_stream(sys.stderr if err else sys.stdout)
    typer.secho(escape_controls(text), file=stream, nl=nl, **style)


class SafeStream(io.TextIOBase):
    """Text stream that drops all output after `stream` fails, with a note on stderr."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` to the stream, or drop it after a failure."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._try("flush")

    def has_reader(self) -> bool:
        """Returns whether the other end of the pipe is open."""
        if self._stream is None:
            return False
        try:
            poll = select.poll()
            poll.register(self._stream.fileno(), 0)  # errors only; they are always reported
            return not any(event & select.POLLERR for _, event in poll.poll(0))
        except (AttributeError, OSError, ValueError):  # Windows; not a file
            return True

    def isatty(self) -> bool:
        """Returns whether the stream is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """Returns the file descriptor, from which rich reads the terminal's size."""
        if self._stream is None:
            raise OSError("the stream is closed")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream, which decides what characters rich draws bars with."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def _try(self, method: str, *arguments: Any) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except UnicodeEncodeError:  # the terminal's encoding lacks a character
            self._stream.write(arguments[0].encode(self.encoding, "replace").decode(self.encoding))
        except OSError as error:
            stream, self._stream = self._stream, None
            discard(stream)
            if sys.stderr is not None and stream is not raw_stream(sys.stderr):
                message = error.strerror or type(error).__name__
                sys.stderr.write(f"ftlevel: output is closed ({message}); the command continues.\n")


def discard(stream: TextIO) -> None:
    """Redirect `stream` to the null device, so that flushing it at exit does not fail."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # not a file, as in tests
        pass
