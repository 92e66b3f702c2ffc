"""Turn what a library raises when a run cannot be written into one line that says what is kept."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from shlex import quote

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.errors import RunError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM}
_NEXT_TO_NOTHING = 1 << 20  # bytes: torch gives up on a full disk without saying that it is full
_WRITERS = ("inline_container", "PytorchStreamWriter", "iostream error", "while serializing")


@contextlib.contextmanager
def explain_disk_errors(run: RunDirectory) -> Iterator[None]:
    """Raise RunError, with the newest whole checkpoint, when a file of `run` cannot be written.

    torch raises a RuntimeError about positions in an archive, and safetensors an error of its own;
    other errors pass.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, run)
        if reason is None:
            raise
        raise RunError(f"{run.path} cannot be written: {reason}. {_what_is_kept(run)}") from error


def _reason(error: Exception, run: RunDirectory) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    of_writer = any(word in text for word in _WRITERS)
    if number not in _FULL | _REFUSED and not of_writer:
        return None
    free = shutil.disk_usage(run.path).free
    if number in _FULL or "os error 28" in text or (of_writer and free < _NEXT_TO_NOTHING):
        return f"its disk is full ({free / 1e6:,.1f} MB free)"
    return os.strerror(number) if number else text.split("\n")[0]


def _what_is_kept(run: RunDirectory) -> str:
    # Newer ones that are not whole are set aside, and named, when the run goes on.
    whole, _ = checkpoints.newest_whole(run.checkpoints)
    if whole is None:
        return "There is no whole checkpoint: mend that, and start again with --overwrite."
    directory = quote(str(run.path))
    return (
        f"{whole} is whole. Mend that, and go on with: ftlevel train --output-dir {directory} "
        "--resume"
    )
