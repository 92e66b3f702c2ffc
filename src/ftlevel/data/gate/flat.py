"""Concatenated rows of tokens, so that checks are array operations instead of loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.data.encoding.store import RowStore

_ROWS = 4_096
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Ragged:
    """Integers of several rows: row i is `values[starts[i]:starts[i + 1]]`."""

    values: NDArray[np.int32]
    starts: Integers

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Integers:
        """Number of values of each row."""
        return np.diff(self.starts)

    def count(self, mask: Mask) -> Integers:
        """Return the number of true values of `mask` in each row."""
        total = np.concatenate(([0], np.cumsum(mask)))
        return total[self.starts[1:]] - total[self.starts[:-1]]

    def any(self, mask: Mask) -> Mask:
        """Return for each row whether `mask` is true anywhere."""
        return self.count(mask) > 0


def lay_out(rows: Iterable[Sequence[int]]) -> Ragged:
    """Concatenate `rows`."""
    kept = list(rows)
    starts = np.zeros(len(kept) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in kept], out=starts[1:])
    values = np.fromiter(chain.from_iterable(kept), dtype=np.int32, count=int(starts[-1]))
    return Ragged(values, starts)


def gather(rows: Sequence[Encoded], at: Integers) -> Ragged:
    """Return the token ids of the rows at `at`."""
    if isinstance(rows, RowStore):
        return Ragged(*rows.gather(at))
    return lay_out(rows[i].input_ids for i in at.tolist())


def examples_of(rows: Sequence[Encoded], at: Integers) -> Integers:
    """Return the example index of each row at `at`."""
    return np.fromiter((rows[i].row for i in at.tolist()), dtype=np.int64, count=len(at))


def rows_of_examples(rows: Sequence[Encoded], examples: Integers) -> Mask:
    """Return a mask of the rows that belong to `examples`."""
    found = np.zeros(len(rows), dtype=bool)
    begin = 0
    for flat in flat_batches(rows) if len(examples) else ():
        end = begin + len(flat.example)
        found[begin:end] = np.isin(flat.example, examples)
        begin = end
    return found


def examples_in(rows: Sequence[Encoded], keep: Mask, total: int) -> Mask:
    """Return a mask of `total` examples that have a row in `keep`."""
    found = np.zeros(total, dtype=bool)
    if not isinstance(rows, RowStore):
        found[examples_of(rows, np.flatnonzero(keep))] = True
        return found
    begin = 0
    for batch in rows.batches():
        examples = batch.column("row").to_numpy()
        found[examples[keep[begin : begin + len(examples)]]] = True
        begin += len(examples)
    return found


def _ragged(array: Any) -> Ragged:
    starts = array.offsets.to_numpy().astype(np.int64)
    return Ragged(array.values.to_numpy()[starts[0] : starts[-1]], starts - starts[0])


@dataclass(frozen=True)
class FlatRows:
    """Concatenated encoded rows; rows of one example are adjacent.

    Attributes:
        labels: token labels, of `ids` or of the target; None if labels are per row.
        example: index of the example of each row.
    """

    ids: Ragged
    labels: Ragged | None
    example: Integers

    @classmethod
    def of(cls, rows: Sequence[Encoded]) -> FlatRows:
        """Concatenate encoded rows."""
        labels = [row.labels for row in rows if isinstance(row.labels, list)]
        return cls(
            lay_out(row.input_ids for row in rows),
            lay_out(labels) if len(labels) == len(rows) else None,
            np.fromiter((row.row for row in rows), dtype=np.int64, count=len(rows)),
        )

    @classmethod
    def of_batch(cls, batch: Any, *, token_labels: bool) -> FlatRows:
        """Convert a record batch of a `RowStore` without building rows."""
        labels = _ragged(batch.column("labels")) if token_labels else None
        return cls(_ragged(batch.column("input_ids")), labels, batch.column("row").to_numpy())

    @property
    def aligned(self) -> bool:
        """Whether `ids` and `labels` have equal lengths in each row."""
        return self.labels is not None and np.array_equal(self.labels.starts, self.ids.starts)

    def supervised(self) -> Integers:
        """Return the number of supervised tokens per row; 1 if labels are per row."""
        if self.labels is None:
            return np.ones(len(self.ids), dtype=np.int64)
        return self.labels.count(self.labels.values != IGNORED)


def flat_batches(rows: Sequence[Encoded]) -> Iterator[FlatRows]:
    """Yield rows in batches of a few thousand; rows of one example stay together."""
    if isinstance(rows, RowStore):
        for batch in rows.batches():
            yield FlatRows.of_batch(batch, token_labels=rows.has_token_labels)
        return
    begin = 0
    while begin < len(rows):
        end = min(begin + _ROWS, len(rows))
        while end < len(rows) and rows[end].row == rows[end - 1].row:
            end += 1
        yield FlatRows.of(rows[begin:end])
        begin = end
