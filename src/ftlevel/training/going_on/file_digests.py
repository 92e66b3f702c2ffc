"""All bytes of the files that a run is made of: the base's weights, and the rows of a stream.

They are read in the background of a run that begins, at the speed of the disk, and before the first
step of a run that goes on.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from ftlevel.artifacts.files import read_plain, write_json
from ftlevel.artifacts.fingerprint import file_fingerprint
from ftlevel.training.plan.plan import Plan

BASE, ROWS = "model.fingerprint", "data.fingerprint"
"""Fields of a run's origin that know samples of the files."""

_MOST = 64 << 30
"""Bytes of a stream's files that are read for this; of those behind them the samples are known.

A core hashes about 1.7 GB a second (AMD EPYC), so that the first checkpoint may wait for half a
minute, where the disk gives as much.
"""


class FileDigests:
    """SHA-256 of whole files, made beside whatever else is done.

    Args:
        field: of the run's origin that knows samples of them.
        words: what messages call them.
        kept: name of the file among the checkpoints that keeps the digests.
        files: name → path; empty for what is not on this disk.
    """

    def __init__(self, field: str, words: str, kept: str, files: Mapping[str, Path]) -> None:
        self.field, self.words, self.kept = field, words, kept
        self._files = files
        self._thread: threading.Thread | None = None

    def keep(self, checkpoints: Path) -> None:
        """Write them into `checkpoints` once it is there, while the run begins, if none are."""
        if not self._files or (checkpoints / self.kept).exists():
            return

        def read_and_write() -> None:
            with contextlib.suppress(MemoryError, OSError):  # said where the run itself meets it
                found = self._read()
                if checkpoints.is_dir():
                    write_json(checkpoints / self.kept, found)

        self._thread = threading.Thread(target=read_and_write, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until they are written."""
        if self._thread is not None:
            self._thread.join()

    def changes(self, checkpoints: Path) -> dict[str, tuple[str | None, str | None]] | None:
        """Return file → its digest when the run began, and now, of those that are others.

        None where nobody knows how it began.
        """
        if not self._files:
            return {}
        try:
            before = json.loads(read_plain(checkpoints / self.kept))
            if not isinstance(before, dict):
                raise TypeError
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        found = self._read()
        both = {name: (before.get(name), found.get(name)) for name in sorted({*before, *found})}
        return {name: (was, now) for name, (was, now) in both.items() if was != now}

    def forget(self, checkpoints: Path) -> None:
        """Let a run that goes on write them anew."""
        (checkpoints / self.kept).unlink(missing_ok=True)

    def _read(self) -> dict[str, str]:
        return {name: file_fingerprint(path) for name, path in self._files.items()}


def digests_of(plan: Plan) -> tuple[FileDigests, FileDigests]:
    """Return the digests of the base's files and of those of a stream's rows."""
    source = plan.model.source
    base = [] if source.path is None else _weights(source.path)
    rows = _within(_MOST, plan.data.stream.files) if plan.data.stream else []
    return (
        FileDigests(BASE, source.words, "base.json", {file.name: file for file in base}),
        FileDigests(ROWS, "the rows", "rows.json", {
            f"file {number} of {len(rows)}": file for number, file in enumerate(rows, 1)
        }),
    )  # fmt: skip


def _weights(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def _within(most: int, files: Sequence[Path]) -> list[Path]:
    """Return the first of `files` that have at most so many bytes together."""
    chosen = []
    for file in files:
        most -= file.stat().st_size
        if most < 0:
            break
        chosen.append(file)
    return chosen
