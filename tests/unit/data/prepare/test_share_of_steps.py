"""Sharding of steps across processes: together they process every row once."""

from __future__ import annotations

import pytest

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.prepare.streaming import LengthGroupedSampler, RowsWithPadding, StepShardSampler


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_cover_every_row_with_equal_batch_counts(rows: int, count: int) -> None:
    order = LengthGroupedSampler([5] * rows, 4, seed=1)
    shares = [list(StepShardSampler(order, 4, count, rank)) for rank in range(count)]
    assert {len(share) for share in shares} == {len(StepShardSampler(order, 4, count, 0))}
    batches = [batch for step in zip(*shares, strict=True) for batch in step]
    assert [row for batch in batches for row in batch if row < rows] == list(order)
    assert all(batch for batch in batches)
    assert all(batch == [rows] for batch in batches if rows in batch)


def test_padding_row_is_marked() -> None:
    rows = RowsWithPadding([Encoded([1, 2], [1, 2], 0), Encoded([3], [3], 1)])
    assert [row.row for row in (rows[i] for i in range(len(rows)))] == [0, 1, -1]
