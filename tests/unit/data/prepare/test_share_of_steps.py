"""Sharding of steps across processes: together they process every row once."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.data import SequentialSampler

from ftlevel.data.encoding.row import Encoded
from ftlevel.data.prepare.samplers import (
    LengthGroupedSampler,
    RowsWithPadding,
    StepShardSampler,
    divide_evenly,
)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_cover_every_row_with_equal_batch_counts(rows, count):
    order = LengthGroupedSampler([5] * rows, 4, seed=1)
    shares = [list(StepShardSampler(order, 4, count, rank)) for rank in range(count)]
    assert {len(share) for share in shares} == {len(StepShardSampler(order, 4, count, 0))}
    batches = [batch for step in zip(*shares, strict=True) for batch in step]
    assert [row for batch in batches for row in batch if row < rows] == list(order)
    assert all(batch for batch in batches)
    assert all(batch == [rows] for batch in batches if rows in batch)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 33])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_division_by_tokens_keeps_rows_of_each_step(rows, count):
    lengths = np.random.default_rng(0).integers(1, 100, rows)
    order = LengthGroupedSampler(lengths, 4 * count, seed=1)
    shares = [list(StepShardSampler(order, 4, count, rank, lengths)) for rank in range(count)]
    expected = list(order)
    for at, step in enumerate(zip(*shares, strict=True)):
        own = expected[at * 4 * count : (at + 1) * 4 * count]
        assert sorted(row for batch in step for row in batch if row < rows) == sorted(own)
        assert all(batch == [rows] for batch in step if rows in batch)
        assert sum(batch == [rows] for batch in step) == max(0, count - len(own)), "no row is idle"


def test_padding_rows_of_an_order_are_not_divided():
    """Steps of several datasets end with padding rows; an index of 4 and more is one."""
    order = SequentialSampler(range(8))
    shares = [list(StepShardSampler(order, 4, 2, rank, [9, 1, 1, 1])) for rank in (0, 1)]
    assert shares == [[[0]], [[1, 2, 3]]]


def test_processes_have_equal_token_counts():
    """Of 8 processes, the one with the most tokens has 1.4 times the mean if rows are counted."""
    lengths = np.random.default_rng(0).lognormal(5, 1, 25_600).astype(int) + 1
    order = LengthGroupedSampler(np.ones(len(lengths), int), 256, seed=1)

    def imbalance(sizes: np.ndarray | None) -> float:
        shares = [StepShardSampler(order, 32, 8, rank, sizes) for rank in range(8)]
        tokens = np.array([[lengths[batch].sum() for batch in share] for share in shares])
        return float((tokens.max(0) / tokens.mean(0)).mean())

    assert imbalance(None) > 1.25
    assert imbalance(lengths) < 1.01


def test_division_is_deterministic_and_sorted():
    assert divide_evenly([5, 5, 9, 1, 4], 2) == [[2, 4], [0, 1, 3]]
    assert divide_evenly([3], 3) == [[0], [], []]
    assert divide_evenly([0, 0, 0], 3) == [[0], [1], [2]]


def test_padding_row_is_marked():
    rows = RowsWithPadding([Encoded([1, 2], [1, 2], 0), Encoded([3], [3], 1)])
    assert [row.row for row in (rows[i] for i in range(len(rows)))] == [0, 1, -1]
