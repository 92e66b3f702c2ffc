"""One function for each way in which files of strangers could do harm: writing and starting.

A run, an adapter or a folder of data may contain links to the user's files, and modules with names
of the standard library.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows
_BINARY = getattr(os, "O_BINARY", 0)


def open_new(path: Path, mode: str = "w", newline: str | None = None) -> IO[Any]:
    """Open a new file for writing, in place of a file or link at `path`; mode w, w+, wb or wb+.

    A link is replaced and never followed, so the file that it points to stays as it is.
    """
    path.unlink(missing_ok=True)
    return _open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode, newline)


def open_existing(path: Path, mode: str = "a", newline: str | None = None) -> IO[Any]:
    """Open a file to append to it (a), which is created if it is missing, or to change it (r+b).

    Raises OSError if `path` is a link.
    """
    flags = os.O_CREAT | os.O_APPEND | os.O_RDWR if mode[0] == "a" else os.O_RDWR
    return _open(path, flags, mode, newline)


def _open(path: Path, flags: int, mode: str, newline: str | None) -> IO[Any]:
    encoding = None if "b" in mode else "utf-8"
    return open(  # noqa: PTH123 - of a descriptor
        os.open(path, flags | _NO_FOLLOW | _BINARY, 0o666), mode, encoding=encoding, newline=newline
    )


def save_text(path: Path, text: str) -> None:
    """Write `text` to a new file, in place of a file or link at `path`."""
    with open_new(path) as file:
        file.write(text)


_WITHOUT_DIRECTORY = "import sys; sys.path[:] = filter(None, sys.path); import runpy; runpy."


def python_command(module: str, *args: str) -> list[str]:
    """Returns the command that runs `module` and imports nothing from the current directory."""
    run = f"run_module({module!r}, run_name='__main__', alter_sys=True)"  # as -m, which imports
    return [sys.executable, "-c", _WITHOUT_DIRECTORY + run, *args]


def script_command(python: str, script: Path, *args: str) -> list[str]:
    """Returns the command that runs `script`, and imports nothing from its directory."""
    run = f"run_path({str(script)!r}, run_name='__main__')"
    return [python, "-c", _WITHOUT_DIRECTORY + run, *args]


def start_process(command: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
    """Start a process; Python processes that it starts import nothing from their directory."""
    env = {**(kwargs.pop("env", None) or os.environ), "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(command, env=env, **kwargs)
