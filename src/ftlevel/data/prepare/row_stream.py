"""An endless stream of encoded, checked and shuffled rows.

A `StreamState` has everything needed to resume the stream without reading previous rows. The
shuffle depends only on the rows, the buffer size and the seed.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

from ftlevel.config import DataConfig
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.fit import MAX_DROP_RATIO
from ftlevel.data.formats.detect import Format
from ftlevel.data.formats.examples import convert_rows
from ftlevel.data.gate import explain_stop
from ftlevel.data.gate.gate import Gate
from ftlevel.data.prepare.encoder import Encoder
from ftlevel.data.sources.streams import Chunk, Cursor, Stream
from ftlevel.data.sources.table import BadRow, RowSchema, Table, describe_bad_rows
from ftlevel.errors import InputError

T = TypeVar("T")


class ShuffleBuffer(Generic[T]):
    """Shuffle buffer of `size` items: a new item replaces a random one; size 1 keeps the order."""

    def __init__(self, size: int, seed: str) -> None:
        self.items: list[T] = []
        self._size = size
        self._random = random.Random(seed)

    def push(self, item: T) -> T | None:
        """Add an item; return the item it replaces, or None while the buffer fills."""
        if self._size == 1:
            return item
        if len(self.items) < self._size:
            self.items.append(item)
            return None
        at = self._random.randrange(self._size)
        out, self.items[at] = self.items[at], item
        return out

    def pop(self) -> T:
        """Remove and return a random item; raise `IndexError` if the buffer is empty."""
        if not self.items:
            raise IndexError("the buffer is empty")
        at = self._random.randrange(len(self.items))
        self.items[at], self.items[-1] = self.items[-1], self.items[at]
        return self.items.pop()

    def draws(self) -> Any:
        """Returns the state of the random generator as plain values."""
        return self._random.getstate()

    def set_draws(self, state: Any) -> None:
        """Restore the state of the random generator."""
        version, numbers, gauss = state
        self._random.setstate((version, tuple(numbers), gauss))


_MIN_ROWS = 1_000  # for a reliable share
_MOST_AHEAD = 32  # chunks encoded ahead; further processes take later ones


@dataclass(frozen=True)
class ChunkEncoder:
    """Encoder of chunks; `may_drop`: rows over the maximum length are dropped, at most 1 %."""

    config: DataConfig
    shape: Format
    schema: RowSchema
    encoder: Encoder
    gate: Gate
    may_drop: bool

    def __call__(self, chunk: Chunk, counts: Counter[str]) -> list[Encoded]:
        """Returns the rows of `chunk`; `Encoded.row` is the line number. Updates `counts`."""
        table = chunk.table
        counts["read"] += len(chunk.rows) + len(chunk.errors)
        errors = [*chunk.errors, *self.schema.get_inconsistent(chunk.rows, chunk.lines)]
        table = self._without(table, errors, counts)
        examples, errors = convert_rows(table, self.shape) if table.rows else ([], [])
        if errors:
            table = self._without(table, errors, counts)
            examples = convert_rows(table, self.shape)[0] if table.rows else []
        if not examples:
            return []
        fitted = self.encoder(examples, table)
        counts.update(too_long=fitted.dropped, shortened=fitted.shortened, split=fitted.split)
        counts["dropped"] += fitted.dropped
        if not len(fitted.rows):
            return []
        split = self.gate.check_rows("train", fitted, len(examples), table)
        stops = [explain_stop(finding) for finding in split.findings if finding.action == "stop"]
        if stops:
            raise InputError(stops)
        for finding in split.findings:
            counts[f"gate.{finding.name}"] += finding.count
        counts["dropped"] += int((~split.keep).sum())
        rows = [fitted.rows[i] for i in np.flatnonzero(split.keep).tolist()]
        return [replace(row, row=table.lines[row.row]) for row in rows]

    def _without(self, table: Table, errors: list[BadRow], counts: Counter[str]) -> Table:
        gate, skips = self.config.gate, self.config.on_bad_row == "skip"
        stops = [
            row
            for row in errors
            if not skips and not (row.finding and getattr(gate, row.finding) == "drop")
        ]
        if stops:
            raise InputError(describe_bad_rows(table, stops))
        lines = {row.line for row in errors}
        for row in {row.line: row for row in errors}.values():
            counts[f"gate.{row.finding}" if row.finding else "bad"] += 1
        counts["dropped"] += len(lines)
        return table.take(i for i, line in enumerate(table.lines) if line not in lines)

    def check_dropped(self, counts: Mapping[str, int]) -> None:
        """Raise `InputError` if over 1 % of rows exceed the length derived from the first rows."""
        lost, read = counts.get("too_long", 0), counts.get("read", 0)
        if self.may_drop and read >= _MIN_ROWS and lost > MAX_DROP_RATIO * read:
            raise InputError(
                f"{lost:,} of the {read:,} rows read so far are longer than "
                f"{self.encoder.config.max_length:,} tokens, which was enough for the first ones. "
                "Set --max-length, or pass --overlong drop or truncate-prompt."
            )


@dataclass(frozen=True)
class StreamState:
    """State from which a `RowStream` resumes.

    Attributes:
        passes: number of completed passes over the source.
        cursor: position of the next chunk; None at the beginning of a pass.
        skip: number of held-out rows that are still to be skipped after the cursor.
        kept: whether the current pass has produced a row.
        waiting: encoded rows that are not in the buffer yet.
        buffered: encoded rows in the shuffle buffer.
        draws: state of the random generator.
    """

    passes: int
    cursor: Cursor | None
    skip: int
    kept: bool
    waiting: tuple[Encoded, ...]
    buffered: tuple[Encoded, ...]
    draws: Any
    counts: dict[str, int] = field(default_factory=dict)


class EncodedChunk(NamedTuple):
    """Encoded rows of a chunk, counts of changes, and the `error` if a row stops the run."""

    rows: list[Encoded]
    counts: Counter[str]
    error: InputError | None = None


_Ready: TypeAlias = tuple[EncodedChunk, Cursor | None, int]
"""An encoded chunk, the cursor after it, and the number of held-out rows after the cursor."""


@dataclass(frozen=True)
class StreamSharding:
    """Distribution of a stream over processes: each encodes some of the chunks.

    All processes receive all rows in stream order, so the result equals that of one process.
    `exchange` is an all-gather of encoded chunks; all processes must call it together.
    """

    count: int = 1
    rank: int = 0
    exchange: Callable[[list[EncodedChunk]], list[list[EncodedChunk]]] = lambda chunks: [chunks]


class RowStream:
    """Endless iterator of encoded rows; each pass yields every usable row once, shuffled.

    The first `held_out` rows of the source are skipped.
    """

    def __init__(
        self,
        source: Stream,
        encode: ChunkEncoder,
        held_out: int,
        buffer: int,
        seed: int,
        files: Sequence[Path] = (),
    ) -> None:
        self.files = files
        self._source, self._encode, self._held_out = source, encode, held_out
        self._size, self._seed = buffer, seed
        self._counts: Counter[str] = Counter()
        self.divide(StreamSharding())
        self._begin_pass()

    def divide(self, sharding: StreamSharding) -> None:
        """From now on, encode only this process's chunks and receive the rows of the others."""
        self._sharding, self._next_rank = sharding, 0

    @property
    def counts(self) -> dict[str, int]:
        """Counts of rows read, dropped and changed."""
        return {"passes": self._passes, **self._counts}

    def state(self) -> StreamState:
        """Returns the state of the stream."""
        return StreamState(
            self._passes,
            self._cursor,
            self._skip,
            self._kept,
            tuple(self._waiting),
            tuple(self._buffer.items),
            self._buffer.draws(),
            dict(self._counts),
        )

    def set_state(self, state: StreamState) -> None:
        """Resume from `state`."""
        self._begin_pass(state.passes, state.cursor)
        self._skip, self._kept = state.skip, state.kept
        self._skip_ahead = state.skip
        self._waiting.extend(state.waiting)
        self._buffer.items.extend(state.buffered)
        self._buffer.set_draws(state.draws)
        self._counts = Counter(state.counts)

    def _begin_pass(self, number: int = 0, state: Cursor | None = None) -> None:
        self._passes, self._cursor = number, state
        self._skip = self._skip_ahead = self._held_out
        self._ready: deque[_Ready] = deque()
        self._chunks = self._source.chunks(state)
        self._waiting: deque[Encoded] = deque()
        self._buffer: ShuffleBuffer[Encoded] = ShuffleBuffer(self._size, f"{self._seed}:{number}")
        self._kept = False

    def __iter__(self) -> Iterator[Encoded]:
        return self

    def __next__(self) -> Encoded:
        """Returns the next row; raises `InputError` for a bad row, or if too many are dropped."""
        while True:
            while self._waiting:
                if (row := self._buffer.push(self._waiting.popleft())) is not None:
                    return row
            if self._read():
                continue
            if self._buffer.items:
                return self._buffer.pop()
            if not self._kept:
                raise InputError("--streaming: no row is left to train on; all were dropped.")
            self._begin_pass(self._passes + 1)

    def _read(self) -> bool:
        """Queue the rows of the next chunk or raise its error; return False after the last one."""
        if not self._ready:
            self._encode_ahead()
        if not self._ready:
            return False
        (rows, counts, error), self._cursor, self._skip = self._ready.popleft()
        self._counts.update(counts)
        if error is not None:
            raise error
        self._encode.check_dropped(self._counts)
        self._waiting.extend(rows)
        self._kept = self._kept or bool(self._waiting)
        return True

    def _encode_ahead(self) -> None:
        sharding, error = self._sharding, None
        encoded: list[EncodedChunk] = []  # of this process
        cursors: list[tuple[int, Cursor, int]] = []  # rank, cursor, held-out rows after it
        try:
            for chunk in islice(self._chunks, min(sharding.count, _MOST_AHEAD)):
                skip = self._skip_ahead
                self._skip_ahead = max(0, skip - len(chunk.rows))
                rank = self._next_rank
                self._next_rank = (rank + 1) % sharding.count
                cursors.append((rank, chunk.cursor, self._skip_ahead))
                if rank == sharding.rank:
                    chunk = replace(chunk, rows=chunk.rows[skip:], lines=chunk.lines[skip:])
                    encoded.append(self._encode_chunk(chunk))
        except InputError as unreadable:
            error = unreadable  # raised after the preceding chunks
        by_rank = [deque(chunks) for chunks in sharding.exchange(encoded)] if cursors else []
        self._ready.extend((by_rank[rank].popleft(), state, skip) for rank, state, skip in cursors)
        if error is not None:
            self._ready.append((EncodedChunk([], Counter(), error), self._cursor, self._skip_ahead))

    def _encode_chunk(self, chunk: Chunk) -> EncodedChunk:
        counts: Counter[str] = Counter()
        try:
            return EncodedChunk(self._encode(chunk, counts), counts)
        except InputError as error:
            return EncodedChunk([], counts, error)
