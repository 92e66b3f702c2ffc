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
from ftlevel.data.gate.duplicates import example_keys

BATCH = 1_000  # examples
Encode = Callable[[Sequence[Any]], list[Encoded]]
Progress = Callable[[int, int], None]
"""Told how many examples of how many are done."""
_Part = tuple[pa.RecordBatch | None, bytes]  # rows, and the keys of the examples


def be_silent(done: int, total: int) -> None:
    """Tell nobody."""


_work: tuple[Encode, Sequence[Any]] | None = None  # inherited by the processes that are forked


def encode_to_store(
    path: Path, encode: Encode, examples: Sequence[Any], processes: int, progress: Progress
) -> RowStore:
    """Encode `examples` batch by batch and write the rows to `path`, in their order.

    The keys by which the gate finds what is there twice are written to `keys_path(path)`, as the
    examples are at hand here.

    Args:
        path: of the file.
        encode: some examples → their rows.
        examples: all of them.
        processes: how many encode; they are forked, and where the system cannot there is one.
        progress: told after each batch.

    Raises:
        ValueError: no example gave a row.
    """
    with keys_path(path).open("wb") as keys:

        def keep_keys() -> Iterator[pa.RecordBatch]:
            for batch, digests in _batches(encode, examples, processes, progress):
                keys.write(digests)
                if batch is not None:
                    yield batch

        return write_store(path, keep_keys())


def keys_path(path: Path) -> Path:
    """Return where the `example_keys` lie of the examples that gave the rows at `path`."""
    return path.with_suffix(".keys")


def _batches(
    encode: Encode, examples: Sequence[Any], processes: int, progress: Progress
) -> Iterator[_Part]:
    global _work
    starts = range(0, len(examples), BATCH)
    _work = (encode, examples)
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
    for number, (batch, keys) in enumerate(parts, 1):
        progress(min(number * BATCH, total), total)
        if isinstance(batch, bytes):
            batch = pa.ipc.open_stream(batch).read_next_batch() if batch else None
        yield batch, keys


def _begin() -> None:
    """Keep a forked tokenizer to one thread: those of its parent are not there."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_from(start: int) -> _Part:
    if _work is None:
        raise RuntimeError("there is no work")
    encode, examples = _work
    some = examples[start : start + BATCH]
    rows = encode(some)
    return to_batch(rows) if rows else None, example_keys(some).tobytes()


def _encode_bytes(start: int) -> tuple[bytes, bytes]:
    """Return a batch as bytes, which pass between processes without being taken apart."""
    batch, keys = _encode_from(start)
    if batch is None:
        return b"", keys
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes()), keys
