"""What no reader is for: said in one line with the way out, before a byte is decoded."""

from __future__ import annotations

import shlex
import stat
from collections.abc import Callable
from pathlib import Path

from ftlevel.errors import InputError, did_you_mean, listing

_KINDS = {
    "an image": (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".svg"),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".opus"),
    "a video": (".mp4", ".avi", ".mov", ".mkv", ".webm"),
    "a document": (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".pptx"),
}
_ARCHIVES = {".zip": "unzip", ".tar": "tar xf", ".tgz": "tar xzf", ".7z": "7z x"}


def refuse_unknown(path: Path, suffix: str, readable: list[str]) -> InputError:
    """Return the error for a file whose suffix no reader has.

    Args:
        path: the file.
        suffix: of its name, behind which a suffix of compression may stand.
        readable: the suffixes that are read.
    """
    for kind, suffixes in _KINDS.items():
        if suffix in suffixes:
            text = "Extract its text first, as .txt or .jsonl." if kind == "a document" else (
                "Give its text, such as captions or transcripts, as .jsonl or .csv."
            )  # fmt: skip
            return InputError(f"{path}: is {kind}, and ftlevel learns from text. {text}")
    if suffix in _ARCHIVES:
        return InputError(
            f"{path}: is an archive of files. Unpack it and name the directory: "
            f"{_ARCHIVES[suffix]} {shlex.quote(path.name)}"
        )
    way = "Save the sheet as .xlsx or .csv." if suffix == ".xls" else (
        "Convert it, or say what it is with --input-format."
    )  # fmt: skip
    return InputError(
        f"{path}: cannot read {suffix or 'a file without extension'!r}. "
        f"Formats: {listing(readable, 20)}. {way}"
    )


def check_is_file(path: Path, data_files: Callable[[Path], list[str]]) -> None:
    """Refuse what is no regular file, or has nothing in it.

    Raises:
        InputError: it is missing, a directory, a pipe, a device, or empty.
    """
    if path.is_dir():
        names = data_files(path)
        there = f"Files in it: {listing(names)}." if names else "It holds no data file."
        raise InputError(f"{path}: is a directory, not a file. {there} Name one file.")
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: {_describe_link(path)}")
    if not path.exists():
        raise InputError(describe_missing(path))
    mode = path.stat().st_mode
    if stat.S_ISFIFO(mode):
        raise InputError(
            f"{path}: is a named pipe, which can be read only once. Pipe it into stdin: "
            "--dataset -, or save it to a file."
        )
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is a device or a socket, not a file of rows. Name a file.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: has 0 rows (0 bytes). Give a file with rows.")


def _describe_link(path: Path) -> str:
    """Return what is wrong with a symbolic link that leads to no file."""
    try:
        path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) or error.errno != 2:
            return "is a symbolic link that leads back to itself. Name the file."
    return f"is a symbolic link to {path.readlink()}, which is not there. Name the file."


def describe_missing(path: Path) -> str:
    """Return the message for a path that does not exist, with what is there instead."""
    folder = path.parent
    if path.is_symlink():
        return f"{path}: {_describe_link(path)}"
    if not folder.is_dir():
        return f"{path}: no such file, and no directory {folder}. Check the path."
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    place = "the current directory" if str(folder) == "." else str(folder)
    there = f"In {place}: {listing(names, 8)}." if names else f"{place} is empty."
    return f"{path}: no such file.{did_you_mean(path.name, names)} {there}"
