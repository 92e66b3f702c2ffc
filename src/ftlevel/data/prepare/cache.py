"""Where prepared rows lie between runs: a folder a key, whole or absent, under the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ftlevel.artifacts.checkpoints import certify, find_damage
from ftlevel.config import IN_MEMORY
from ftlevel.data.sources.readers.files import is_pattern, match_files

KEEP_DAYS = 30


def cache_root() -> Path:
    """Return the folder of all keys: `$XDG_CACHE_HOME/ftlevel/rows`, or under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ftlevel" / "rows"


def is_writable() -> bool:
    """Whether something can be kept; a home that is read only is no reason to stop."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(root, os.W_OK | os.X_OK)


def files_of(name: str) -> list[Path] | None:
    """Return the file called `name`, those below the directory, or that it matches, in order.

    None for what is no path here: rows in memory, and a set of the Hub, which has its own cache.
    """
    if name == IN_MEMORY:
        return None
    if is_pattern(name):
        return match_files(name)
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Folder:
    """The folder of a key.

    Attributes:
        path: where the rows are, or are to be written.
        keep: makes a folder that was written the one of its key; None if the rows are there.
        damage: what is wrong with the rows that were there, empty for nothing.
    """

    path: Path
    keep: Callable[[], Path] | None = None
    damage: str = ""


@contextmanager
def folder_of(key: str) -> Iterator[Folder]:
    """Give the folder of `key` if it is whole, byte for byte, else an empty one to write into.

    Of several processes one prepares, and the others wait for it here.
    """
    from filelock import FileLock

    root = cache_root()
    final, partial = root / key, root / f".{key}.partial"
    with FileLock(root / f".{key}.lock"):
        damage = find_damage(final) if final.is_dir() else ""
        if damage is None:
            os.utime(final)
            yield Folder(final)
            return
        for old in (final, partial):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()

        def keep() -> Path:
            certify(partial)
            return partial.replace(final)

        try:
            yield Folder(partial, keep, damage)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            remove_unused(root)


def remove_unused(root: Path) -> None:
    """Remove what no run used for a month."""
    oldest = time.time() - KEEP_DAYS * 24 * 3600
    for folder in root.iterdir():
        if folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else folder.unlink()
