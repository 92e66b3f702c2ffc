"""One function for each way in which strangers could do harm: write, start, print, answer.

A run, an adapter or a folder of data may contain links to the user's files, modules with names of
the standard library, and control sequences of terminals. A server may redirect, or never end.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
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


_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and newline, DEL, C1
    "\u202a-\u202e\u2066-\u2069"  # change the order of the text around them
    "\ud800-\udfff]"  # bytes of file names that are not UTF-8
)


def escape_controls(text: str) -> str:
    r"""Returns `text` with control characters as escapes such as `\x1b`, except tab and newline."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def escape_json(text: str) -> str:
    """Returns the JSON `text` without control characters in its strings, with the same value."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


_PASSWORDS = re.compile(
    r"(:/{1,2}[^\s/:@]*:)[^\s/]+(?=@)|([?&][^\s=&]*(?:password|token|secret|key)[^\s=&]*=)[^\s&]+",
    re.IGNORECASE,
)


def mask_passwords(text: str) -> str:
    """Returns `text` with `***` for the passwords and tokens of the URLs in it."""
    return _PASSWORDS.sub(lambda match: f"{match[1] or match[2]}***", text)


def send_request(url: str, data: bytes | None, timeout: float, max_bytes: int) -> tuple[int, str]:
    """Returns status and text of a POST of the JSON `data` to `url`, or of a GET without `data`.

    Uses no proxy, follows no redirect, and reads at most `max_bytes`. Raises TimeoutError if the
    response is not complete after `timeout` seconds, OSError if the server speaks no HTTP.
    """
    from http.client import HTTPException  # lazy: takes 30 ms
    from urllib import request

    class Unprocessed(request.HTTPErrorProcessor):
        def http_response(self, _: Any, response: Any) -> Any:  # also of redirects and errors
            return response

        https_response = http_response  # type: ignore[assignment]

    outcome: list[tuple[int, str] | BaseException] = []

    def exchange() -> None:
        opener = request.build_opener(request.ProxyHandler({}), Unprocessed)
        query = request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with opener.open(query, timeout=timeout) as response:
                text = response.read(max_bytes).decode(errors="replace")
            outcome.append((response.status, text or response.reason))
        except HTTPException as problem:
            outcome.append(OSError(str(problem).strip()))
        except BaseException as problem:  # noqa: BLE001 - raised in the caller's thread
            outcome.append(problem)

    # The timeout of a socket begins anew with every byte that a server sends.
    thread = threading.Thread(target=exchange, daemon=True)
    thread.start()
    thread.join(timeout)
    result = outcome[0] if outcome else TimeoutError(f"no complete answer after {timeout:g} s")
    if isinstance(result, BaseException):
        raise result
    return result
