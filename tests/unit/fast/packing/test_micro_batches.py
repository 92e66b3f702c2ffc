"""Rows are cut into micro-batches: each once, within the budget, in as few as that allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlevel.fast.packing import (
    MicroBatches,
    count_computed_tokens,
    split_packed,
    split_padded,
    split_shared,
)
from ftlevel.fast.prefixes import create_prefix_tree, sort_by_prefix

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def cut(lengths: list[int], budget: int, is_padded: bool, multiple: int = 1) -> MicroBatches:
    return (split_padded if is_padded else split_packed)(lengths, budget, multiple)


def cost(lengths: list[int], rows: list[int], is_padded: bool) -> int:
    own = [lengths[row] for row in rows]
    return max(own) * len(own) if is_padded else sum(own)


@given(LENGTHS, st.integers(1, 100), st.booleans(), st.integers(1, 4))
def test_every_row_is_in_one_micro_batch_within_the_budget(
    lengths: list[int], budget: int, is_padded: bool, multiple: int
) -> None:
    micro_batches = cut(lengths, budget, is_padded, multiple)
    assert sorted(row for rows in micro_batches for row in rows) == list(range(len(lengths)))
    for rows in micro_batches:
        assert len(rows) == 1 or cost(lengths, rows, is_padded) <= budget
        own = [lengths[row] for row in rows]
        assert own == sorted(own, reverse=True)
    if is_padded:
        flat = [lengths[row] for rows in micro_batches for row in rows]
        assert flat == sorted(lengths, reverse=True)
    else:
        assert len(micro_batches) % multiple == 0 or len(micro_batches) == len(lengths)


@given(st.lists(st.integers(1, 60), min_size=8, max_size=40))
def test_packed_micro_batches_in_parallel_are_even(lengths: list[int]) -> None:
    """Graham's bound: the longest is no more than 4/3 - 1/6 of the best, which is at least this."""
    costs = [cost(lengths, rows, False) for rows in cut(lengths, 10_000, False, 2)]
    assert len(costs) == 2
    best = max(max(lengths), -(-sum(lengths) // 2))
    assert max(costs) <= best * 7 / 6 + max(lengths) / 3


@given(
    st.lists(
        st.tuples(st.sampled_from([(), (1,) * 9, (1,) * 9 + (2,) * 7]), st.integers(1, 20)),
        min_size=1, max_size=12,
    ),
    st.integers(10, 80), st.integers(1, 3),
)  # fmt: skip
def test_shared_micro_batches_cost_what_their_trees_hold(
    texts: list[tuple[tuple[int, ...], int]], budget: int, multiple: int
) -> None:
    rows = [
        [*start, *(100 * number + i for i in range(own))]
        for number, (start, own) in enumerate(texts, start=1)
    ]
    lengths = [len(row) for row in rows]
    order, shared = sort_by_prefix(rows, min_length=5)
    micro_batches = split_shared(lengths, budget, order, shared, multiple)
    assert sorted(row for part in micro_batches for row in part) == list(range(len(rows)))
    for part in micro_batches:
        found = create_prefix_tree([rows[row] for row in part], min_length=5).tokens
        assert count_computed_tokens(part, lengths, order, shared) == found
        assert len(part) == 1 or found <= budget


def test_rows_that_all_begin_alike_are_spread_evenly() -> None:
    lengths, order = [40, 40, 12, 12, 12, 12], [0, 1, 2, 3, 4, 5]
    shared = [0, 10, 10, 10, 10, 10]
    micro_batches = split_shared(lengths, 1000, order, shared, 2)
    assert [count_computed_tokens(rows, lengths, order, shared) for rows in micro_batches] == [
        44,
        44,
    ]
    assert micro_batches == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(("is_padded", "costs"), [(False, [50, 50]), (True, [56, 48])])
def test_micro_batches_are_even(is_padded: bool, costs: list[int]) -> None:
    lengths = [12, 12, 12, 14, 10, 14, 14, 12]
    micro_batches = cut(lengths, 60, is_padded)
    assert [cost(lengths, rows, is_padded) for rows in micro_batches] == costs


def test_the_same_rows_are_cut_the_same() -> None:
    lengths = [5, 9, 5, 9, 1]
    assert split_packed(lengths, 14) == split_packed(lengths, 14)
    assert split_packed(lengths, 14) == [[1, 4], [0, 2], [3]]


def test_rows_that_share_cost_less_together() -> None:
    # Rows 0 and 2 share 8 tokens, 1 and 3 nothing; order as of `sort_by_prefix`.
    assert split_shared([10, 10, 10, 10], 12, [0, 2, 1, 3], [0, 0, 8, 0]) == [[0, 2], [1], [3]]
    assert split_packed([10, 10, 10, 10], 12) == [[0], [1], [2], [3]]
