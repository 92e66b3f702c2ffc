"""A directory that is absent or whole: built beside its place and renamed into it at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ftlevel.errors import ConfigError


def check_place(directory: Path, flag: str) -> None:
    """Refuse a place where a directory cannot be put, before anything is loaded.

    Raises:
        ConfigError: something is there, or its parent cannot be written.
    """
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ConfigError(
            f"{flag} {directory} exists and is not empty. Name another directory, or delete it."
        )
    existing = next(p for p in directory.absolute().parents if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{flag} {directory}: {existing} cannot be written. Name another directory."
        )


@contextlib.contextmanager
def build_place(directory: Path) -> Iterator[Path]:
    """Give an empty directory beside `directory`; it takes that place when the block ends well.

    When the block raises, it is deleted. What a killed process left behind is deleted by the next.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if directory.is_dir():
            directory.rmdir()  # check_place has seen that it is empty
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
