"""Fingerprints of weights and data: what a base model is, told without reading all of it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ftlevel.errors import InputError

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
