"""Encode many examples in batches, by one process or several, straight into a store."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.store import RowStore, to_batch, write_store
from ftlevel.data.gate.digests import Digests, words_path
from ftlevel.data.gate.texts import TextsKnown

BATCH = 1_000  # examples
Encode = Callable[[Sequence[Any]], list[Encoded]]
Progress = Callable[[int, int], None]
"""Told how many examples of how many are done."""
_Part = tuple[pa.RecordBatch | None, tuple[bytes, bytes]]  # rows, and digests of the examples


def be_silent(done: int, total: int) -> None:
    """Tell nobody."""


_work: tuple[Encode, Sequence[Any], TextsKnown] | None = (
    None  # inherited by the processes that are forked
)


def encode_to_store(
    path: Path,
    encode: Encode,
    examples: Sequence[Any],
    known: TextsKnown,
    processes: int,
    progress: Progress,
) -> RowStore:
    """Encode `examples` batch by batch and write the rows to `path`, in their order.

    The digests that the gate reads are written to `digests_path(path)`, as the examples are at hand
    here.

    Args:
        path: of the file.
        encode: some examples → their rows.
        examples: all of them.
        known: what checks of texts must know.
        processes: how many encode; they are forked, and where the system cannot there is one.
        progress: told after each batch.

    Raises:
        ValueError: no example gave a row.
    """
    beside = digests_path(path)
    with beside.open("wb") as records, words_path(beside).open("wb") as words:

        def keep_digests() -> Iterator[pa.RecordBatch]:
            work = (encode, examples, known)
            for batch, digests in _batches(work, processes, progress):
                records.write(digests[0])
                words.write(digests[1])
                if batch is not None:
                    yield batch

        return write_store(path, keep_digests())


def digests_path(path: Path) -> Path:
    """Return where the digests lie of the examples that gave the rows at `path`."""
    return path.with_suffix(".digests")


def _batches(
    work: tuple[Encode, Sequence[Any], TextsKnown], processes: int, progress: Progress
) -> Iterator[_Part]:
    global _work
    examples = work[1]
    starts = range(0, len(examples), BATCH)
    _work = work
    try:
        if processes == 1 or "fork" not in multiprocessing.get_all_start_methods():
            yield from _reported(map(_encode_from, starts), len(examples), progress)
            return
        with multiprocessing.get_context("fork").Pool(processes, _begin) as pool:
            yield from _reported(pool.imap(_encode_bytes, starts), len(examples), progress)
    finally:
        _work = None


def _reported(parts: Any, total: int, progress: Progress) -> Iterator[_Part]:
    """Yield the parts, with batches that came as bytes put together."""
    for number, (batch, digests) in enumerate(parts, 1):
        progress(min(number * BATCH, total), total)
        if isinstance(batch, bytes):
            batch = pa.ipc.open_stream(batch).read_next_batch() if batch else None
        yield batch, digests


def _begin() -> None:
    """Keep a forked tokenizer to one thread: those of its parent are not there."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_from(start: int) -> _Part:
    if _work is None:
        raise RuntimeError("there is no work")
    encode, examples, known = _work
    some = examples[start : start + BATCH]
    rows = encode(some)
    return to_batch(rows) if rows else None, Digests.of(some, known).to_bytes()


def _encode_bytes(start: int) -> tuple[bytes, tuple[bytes, bytes]]:
    """Return a batch as bytes, which pass between processes without being taken apart."""
    batch, digests = _encode_from(start)
    if batch is None:
        return b"", digests
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes()), digests
