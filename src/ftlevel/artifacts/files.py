"""Writing a file so that it is absent or whole, whenever the process is killed.

Fingerprints of weights and data: what a base model is, told without reading all of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ftlevel.errors import ConfigError, InputError, listing

_in_place: list[Path] = []
"""What this process has put in place, whole."""


def describe_interrupt() -> str:
    """Say of a command that was interrupted what there is of its output: all of it, or nothing."""
    whole = [path for path in _in_place if path.exists()]
    if not whole:
        return "interrupted; nothing was kept."
    return f"interrupted; {listing(map(str, whole))} was written before that, and is whole."


def flush(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens none
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(directory: Path) -> None:
    """Flush `directory` and everything below it to the disk."""
    for path in (*directory.rglob("*"), directory):
        if path.is_dir() or path.is_file():
            flush(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, flush it to the disk, and rename it into place."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, absent or whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_plain(path: Path) -> str:
    """Return the text of a plain file; a pipe or a device would be waited for without end.

    Raises:
        OSError: it is none, or cannot be read.
        ValueError: it is no UTF-8.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return path.read_text(encoding="utf-8")


def check_regular(paths: Iterable[Path], words: str) -> None:
    """Refuse pipes, sockets and devices, on which reading waits forever or has no end.

    Raises:
        InputError: naming the first.
    """
    for path in sorted(paths):
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing, which nothing reads
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(
                f"{words}: {path.name} is a pipe, a socket or a device. Expected a plain file."
            )


def check_absent(flag: str, path: Path) -> None:
    """Refuse an output that exists or cannot be created; an empty directory is free.

    Raises:
        ConfigError: naming the `flag`.
    """
    if path.is_dir():
        if any(path.iterdir()):
            raise ConfigError(
                f"{flag} {path} exists and is not empty. Name another directory, or delete it."
            )
    elif path.exists() or path.is_symlink():
        raise ConfigError(
            f"{flag} {path} exists, and nothing of yours is overwritten. Name another."
        )
    existing = next(p for p in path.absolute().parents if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path}: {existing} cannot be written. Name another.")


def _make(partial: Path) -> None:
    """Create a directory to write into.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"--out: {partial.parent} cannot be written ({error.strerror}). Name another."
        ) from None


@contextlib.contextmanager
def placed_directory(path: Path) -> Iterator[Path]:
    """Give a new directory beside `path` to write into; it becomes `path` when the block ends.

    Every file is flushed to the disk first, so that `path` is absent or whole whenever the process
    is killed. After an error nothing is left.
    """
    partial = path.with_name(f".{path.name}.partial")
    if partial.exists():  # of a process that was killed
        shutil.rmtree(partial)
    try:
        _make(partial)
        yield partial
        flush_all(partial)
        partial.rename(path)
        flush(path.absolute().parent)
        _in_place.append(path)
    finally:
        _remove(partial)


def check_file_free(flag: str, path: Path, *, overwrite: bool) -> None:
    """Refuse a file that exists, unless it may be replaced, or that cannot be created.

    Raises:
        ConfigError: naming the `flag`.
    """
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a directory. Name a file in it.")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise ConfigError(f"{flag} {path} exists. Name another, or pass --overwrite.")
    existing = next(p for p in path.absolute().parents if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path}: {existing} cannot be written. Name another.")


@contextlib.contextmanager
def placed_files(*paths: Path) -> Iterator[Path]:
    """Give a new directory beside `paths`; files of their names are put in place at the end.

    They are flushed to the disk and renamed one after another, so that each is absent (or what it
    was) or whole whenever the process is killed. What else is in the directory is thrown away, and
    after an error nothing is left.
    """
    parent = paths[0].absolute().parent
    partial = parent / f".{paths[0].name}.partial"
    if partial.exists():  # of a process that was killed
        shutil.rmtree(partial)
    try:
        _make(partial)
        yield partial
        for path in paths:
            flush(partial / path.name)
        for path in paths:
            (partial / path.name).replace(path)
            _in_place.append(path)
        flush(parent)
    finally:
        _remove(partial)


def _remove(partial: Path) -> None:
    """Delete `partial`, though a signal comes meanwhile."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(partial, ignore_errors=True)
        raise


_SAMPLE = 4096


def base_fingerprint(path: Path) -> str:
    """Return a SHA-256 over the names, types, shapes and samples of the weights at `path`.

    Of each tensor in each .safetensors file the first, middle and last 4 KiB are read, so that a
    large model takes a moment; a fine-tuned relative differs in nearly every tensor. Of a .gguf
    file, 4 KiB in every mebibyte.

    Args:
        path: a model directory or a .gguf file.
    """
    digest = hashlib.sha256()
    if path.is_file():
        _sample_file(path, digest)
    else:
        for file in sorted(path.glob("*.safetensors")):
            _sample_safetensors(file, digest)
    return digest.hexdigest()


def base_digest(path: Path) -> str:
    """Return a SHA-256 of every byte of the weights in the directory `path`.

    What a program changed in a model may be a few numbers, which samples would miss.
    """
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"{file.name} {file_fingerprint(file)}\n".encode())
    return digest.hexdigest()


def _sample_safetensors(path: Path, digest: Any) -> None:
    with path.open("rb") as file:
        size, header = _read_header(file, path)
        for name in sorted(key for key in header if key != "__metadata__"):
            entry = header[name]
            begin, end = entry["data_offsets"]
            digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
            for offset in {begin, (begin + end) // 2, max(begin, end - _SAMPLE)}:
                file.seek(8 + size + offset)
                digest.update(file.read(min(_SAMPLE, end - offset)))


def _read_header(file: BinaryIO, path: Path) -> tuple[int, dict[str, Any]]:
    """Return the length of a safetensors header and what it says.

    Raises:
        InputError: it is none.
    """
    try:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > path.stat().st_size:
            raise ValueError("its header would be longer than the file")
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end <= path.stat().st_size:
                    raise ValueError(f"it has no {name[:80]!r}")
                entry["dtype"], entry["shape"]
    except (struct.error, ValueError, LookupError, TypeError, AttributeError,
            RecursionError) as error:  # fmt: skip
        raise InputError(
            f"{path} is not a safetensors file ({error}). Was a copy cut short?"
        ) from None
    return size, header


def _sample_file(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for offset in range(0, size, 1 << 20):
            file.seek(offset)
            digest.update(file.read(_SAMPLE))


def sampled_fingerprint(path: Path) -> str:
    """Return a SHA-256 of the size of a file and of some bytes of each megabyte of it."""
    digest = hashlib.sha256()
    _sample_file(path, digest)
    return digest.hexdigest()


def rows_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a SHA-256 of `rows` in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
