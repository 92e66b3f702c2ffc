"""Write files and directories atomically, check output paths, and compute fingerprints.

A file or directory is absent or complete even if the process is killed. Fingerprints of base models
sample their weights and do not read all of them.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import hashlib
import json
import os
import shutil
import stat
import struct
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlevel.errors import ConfigError, InputError, join_names
from ftlevel.safe_io import open_new

_outputs: list[Path] = []
"""Outputs that this process has completed."""


def format_interrupt() -> str:
    """Returns the message for an interrupted command, which names its complete outputs."""
    existing = [path for path in _outputs if path.exists()]
    if not existing:
        return "interrupted; nothing was saved."
    return f"interrupted; {join_names(map(str, existing))} was written before and is complete."


def flush(path: Path) -> None:
    """Flush a file or directory entry to disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(directory: Path) -> None:
    """Flush `directory` and everything below it to disk."""
    for path in (*directory.rglob("*"), directory):
        if path.is_dir() or path.is_file():
            flush(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: to a temporary file, which is flushed and renamed."""
    partial = path.with_name(f".{path.name}.partial")
    with open_new(partial) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_plain(path: Path) -> str:
    """Returns the text of a regular file; raise OSError for a pipe, on which reading may block."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path.read_text(encoding="utf-8")


def load_json(path: Path, json_type: type = dict) -> Any:
    """Returns the JSON value in a file, an instance of `json_type`; empty without a file."""
    return read_json(path, json_type) if path.exists() else json_type()


_MAX_JSON_BYTES = 1 << 27  # bytes; an index of 100,000 tensors has 10 MB


def read_json(path: Path, json_type: type = dict, problem: str = "") -> Any:
    """Returns the JSON value in a file, an instance of `json_type`; raises InputError otherwise.

    `problem` is the beginning of its message, instead of "PATH cannot be read (".
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = json.loads(read_plain(path))
        if not isinstance(content, json_type):
            raise ValueError(f"it is not {'an object' if json_type is dict else 'a list'}")
    except (OSError, ValueError, RecursionError) as error:
        problem = problem or f"{path} cannot be read ("
        raise InputError(f"{problem}{error}). Is the copy incomplete?") from None
    return content


def check_regular(paths: Iterable[Path], label: str) -> None:
    """Raise InputError, naming `label`, if one of `paths` is a pipe, socket or device."""
    for path in sorted(paths):
        try:
            mode = path.stat().st_mode
        except OSError:  # a dangling link, which nothing reads
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(
                f"{label}: {path.name} is a pipe, a socket or a device. Expected a regular file."
            )


def check_new_output(flag: str, path: Path) -> None:
    """Raise ConfigError on `flag` if `path` is unwritable, or exists and is no empty directory."""
    if path.is_dir():
        if any(path.iterdir()):
            raise ConfigError(
                f"{flag} {path} exists and is not empty. Choose another directory, or delete it."
            )
    elif path.exists() or path.is_symlink():
        raise ConfigError(f"{flag} {path} already exists and is not overwritten. Choose another.")
    check_writable(f"{flag} {path}", path.absolute().parent)


def check_writable(label: str, directory: Path) -> None:
    """Raise ConfigError, naming `label`, if `directory` cannot be written or created."""
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    has_space = not hasattr(os, "statvfs") or os.statvfs(existing).f_blocks  # /proc has none
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK) or not has_space:
        raise ConfigError(f"{label}: {existing} cannot be written. Choose another.")


try:
    import fcntl
except ImportError:  # Windows: no locks, no sweep
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def long_cells() -> Iterator[None]:
    """Increase the csv module's global limit on cell length, 128 KiB, within the context."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


@contextlib.contextmanager
def lock_dir(
    path: Path, *, shared: bool = False, flag: str = "--output-dir", noun: str = "run"
) -> Iterator[None]:
    """Lock a path (flock) in the block; raise ConfigError on `flag` if another process has it.

    With `shared`, other processes may share the lock. No effect on file systems without locks.
    """
    descriptor = None
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
    try:
        if descriptor is not None and fcntl is not None:
            try:
                operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{flag} {path}: another {noun} is writing to it"
                    f"{_get_lock_process(descriptor)}. Wait until it ends, or choose another path."
                ) from None
            except OSError:  # no locks on this file system
                pass
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _get_lock_process(descriptor: int) -> str:
    """Returns " (process PID)" for the lock's holder, from /proc/locks; "" if it is unknown."""
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            values = line.split()
            if values[1] == "FLOCK" and values[5] == f"{device}:{status.st_ino}":
                return f" (process {values[4]})"
    return ""


@contextlib.contextmanager
def _partial_dir(path: Path) -> Iterator[Path]:
    """Yields a new, locked directory beside the output `path`; deletes it when the block ends."""
    partial = path.with_name(f".{path.name}.partial")
    lock = functools.partial(lock_dir, partial, flag="--out", noun="command")
    if partial.exists():  # left by a killed process
        with lock():
            shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"--out: {partial.parent} cannot be written ({error.strerror}). Choose another."
        ) from None
    try:
        with lock():
            yield partial
    finally:
        _remove(partial)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory that is flushed and renamed to `path` when the block ends."""
    if path.is_dir() and (path.is_symlink() or os.path.ismount(path) or path.samefile(Path.cwd())):
        raise ConfigError(
            f"--out {path} is a link, a mount point or the current directory, which cannot be "
            f"replaced. Name a new directory in it: --out {path / 'NAME'}."
        )
    with _partial_dir(path) as partial:
        yield partial
        flush_all(partial)
        partial.rename(path)
        flush(path.absolute().parent)
        _outputs.append(path)


def check_output_file(flag: str, path: Path, *, overwrite: bool) -> None:
    """Raise ConfigError on `flag` if `path` is unwritable, or exists without `overwrite`."""
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a directory. Name a file in it.")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise ConfigError(f"{flag} {path} exists. Choose another, or pass --overwrite.")
    check_writable(f"{flag} {path}", path.absolute().parent)


@contextlib.contextmanager
def atomic_files(*paths: Path) -> Iterator[Path]:
    """Yields a temporary directory, whose files are flushed and moved to `paths` at the end."""
    with _partial_dir(paths[0].absolute()) as partial:
        yield partial
        for path in paths:
            flush(partial / path.name)
        for path in paths:
            (partial / path.name).replace(path)
            _outputs.append(path)
        flush(partial.parent)


def _remove(partial: Path) -> None:
    try:
        shutil.rmtree(partial, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(partial, ignore_errors=True)
        raise


_SAMPLE = 4096


def base_fingerprint(path: Path) -> str:
    """Returns a SHA-256 over names, dtypes, shapes and samples of the weights at `path`.

    Reads the first, middle and last 4 KiB of each tensor of the .safetensors files; of a .gguf
    file, 4 KiB per MiB. A fine-tuned model differs in almost every tensor.
    """
    if path.is_file():
        return sampled_fingerprint(path)
    hasher = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        _sample_safetensors(file, hasher)
    return hasher.hexdigest()


def hash_weights(path: Path) -> str:
    """Returns a SHA-256 over names and contents of the .safetensors files in `path`."""
    hasher = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        hasher.update(f"{file.name} {file_fingerprint(file)}\n".encode())
    return hasher.hexdigest()


def _sample_safetensors(path: Path, hasher: Any) -> None:
    start_of_data, header = load_safetensors_header(path)
    header.pop("__metadata__", None)
    with path.open("rb") as file:
        for name, info in sorted(header.items()):
            start, end = info["data_offsets"]
            hasher.update(f"{name} {info['dtype']} {info['shape']}\n".encode())
            for offset in {start, (start + end) // 2, max(start, end - _SAMPLE)}:
                file.seek(start_of_data + offset)
                hasher.update(file.read(min(_SAMPLE, end - offset)))


def load_safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Returns data offset and header of a safetensors file; raises InputError if it is invalid."""
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > file_size:
                raise ValueError("its header would be longer than the file")
            header = json.loads(file.read(size))
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
            raise TypeError("its header is not a table of tensors")
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if not _is_entry(entry):
                raise TypeError(f"its header lacks type, shape or offsets of {name[:80]!r}")
            if 8 + size + entry["data_offsets"][1] > file_size:
                raise ValueError("it is shorter than its header says")
    except (struct.error, ValueError, TypeError, RecursionError, OSError) as error:
        raise InputError(
            f"{path} is not a safetensors file ({error}). Is the copy incomplete?"
        ) from None
    return 8 + size, header


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    are_sizes = all(isinstance(value, int) and 0 <= value < 1 << 63 for value in shape + offsets)
    return are_sizes and offsets[0] <= offsets[1]


def sampled_fingerprint(path: Path) -> str:
    """Returns a SHA-256 of a file's size and of the first 4 KiB of each of its MiB."""
    size = path.stat().st_size
    hasher = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in range(0, size, 1 << 20):
            file.seek(offset)
            hasher.update(file.read(_SAMPLE))
    return hasher.hexdigest()


def rows_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns a SHA-256 of `rows`, which depends on their order."""
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
        hasher.update(b"\n")
    return hasher.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


_PREFIX = "ftlevel-"
_LOCK_DIR = ".ftlevel-workspace"
"""Subdirectory locked with flock while the process lives; ftlevel's directories have it."""

_MAX_AGE = 24 * 3600
"""Seconds without a change after which an unlocked directory counts as abandoned."""


class Workspace:
    """Temporary directory `name`; creating one deletes those that killed processes left behind."""

    def __init__(self, name: str) -> None:
        self._outer = tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{name}-")
        outer = Path(self._outer.name)
        (outer / _LOCK_DIR).mkdir()
        descriptor = _lock(outer)
        self._unlock = (
            weakref.finalize(self, os.close, descriptor) if descriptor is not None else None
        )
        self.name = str(outer / name)
        Path(self.name).mkdir()
        sweep(outer.parent)

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Delete the directory."""
        self._outer.cleanup()
        if self._unlock is not None:
            self._unlock()


def sweep(parent: Path) -> None:
    """Delete this user's old, unlocked workspaces in `parent`."""
    if fcntl is None:
        return
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock_stat = (path / _LOCK_DIR).lstat()
            is_old = time.time() - lock_stat.st_mtime > _MAX_AGE
            if not is_old or lock_stat.st_uid != os.getuid() or path.is_symlink():
                continue
            descriptor = _lock(path)
            if descriptor is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(descriptor)


def _lock(path: Path) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(path / _LOCK_DIR, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked by another process, or locks unsupported
        os.close(descriptor)
        return None
    return descriptor
