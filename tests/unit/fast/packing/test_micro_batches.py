"""Tests that rows are split into few micro-batches within the token budget."""

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


def split(lengths: list[int], budget: int, is_padded: bool, multiple: int = 1) -> MicroBatches:
    return (split_padded if is_padded else split_packed)(lengths, budget, multiple)


def compute_cost(lengths: list[int], rows: list[int], is_padded: bool) -> int:
    row_lengths = [lengths[row] for row in rows]
    return max(row_lengths) * len(row_lengths) if is_padded else sum(row_lengths)


@given(LENGTHS, st.integers(1, 100), st.booleans(), st.integers(1, 4))
def test_each_row_is_in_one_micro_batch_within_budget(
    lengths: list[int], budget: int, is_padded: bool, multiple: int
) -> None:
    micro_batches = split(lengths, budget, is_padded, multiple)
    assert sorted(row for rows in micro_batches for row in rows) == list(range(len(lengths)))
    for rows in micro_batches:
        assert len(rows) == 1 or compute_cost(lengths, rows, is_padded) <= budget
        row_lengths = [lengths[row] for row in rows]
        assert row_lengths == sorted(row_lengths, reverse=True)
    if is_padded:
        flattened = [lengths[row] for rows in micro_batches for row in rows]
        assert flattened == sorted(lengths, reverse=True)
    else:
        assert len(micro_batches) % multiple == 0 or len(micro_batches) == len(lengths)


@given(st.lists(st.integers(1, 60), min_size=8, max_size=40))
def test_parallel_packed_micro_batches_are_balanced(lengths: list[int]) -> None:
    """Graham's bound: the maximum is at most 4/3 - 1/6 of the optimum."""
    costs = [compute_cost(lengths, rows, False) for rows in split(lengths, 10_000, False, 2)]
    assert len(costs) == 2
    lower_bound = max(max(lengths), -(-sum(lengths) // 2))
    assert max(costs) <= lower_bound * 7 / 6 + max(lengths) / 3


@given(
    st.lists(
        st.tuples(st.sampled_from([(), (1,) * 9, (1,) * 9 + (2,) * 7]), st.integers(1, 20)),
        min_size=1, max_size=12,
    ),
    st.integers(10, 80), st.integers(1, 3),
)  # fmt: skip
def test_computed_tokens_match_prefix_trees(
    texts: list[tuple[tuple[int, ...], int]], budget: int, multiple: int
) -> None:
    rows = [
        [*prefix, *(100 * index + i for i in range(length))]
        for index, (prefix, length) in enumerate(texts, start=1)
    ]
    lengths = [len(row) for row in rows]
    order, shared = sort_by_prefix(rows, min_length=5)
    micro_batches = split_shared(lengths, budget, order, shared, multiple)
    assert sorted(row for micro_batch in micro_batches for row in micro_batch) == list(
        range(len(rows))
    )
    for micro_batch in micro_batches:
        tokens = create_prefix_tree([rows[row] for row in micro_batch], min_length=5).tokens
        assert count_computed_tokens(micro_batch, lengths, order, shared) == tokens
        assert len(micro_batch) == 1 or tokens <= budget


def test_rows_around_a_shorter_prefix_share_only_that() -> None:
    rows = [[1] * 8 + [at] * 4 for at in (2, 3)] + [[1] * 5 + [4] * 7] + [[0] * 12]
    lengths, order = [12] * 4, [3, 2, 0, 1]
    shared = [5, 8, 0, 0]  # of each row with the one before it in `order`
    assert count_computed_tokens([0, 1], lengths, order, shared) == 12 + 4
    assert count_computed_tokens([2, 1], lengths, order, shared) == 12 + 7
    assert create_prefix_tree([rows[2], rows[1]], min_length=5).tokens == 12 + 7
    assert count_computed_tokens([3, 1], lengths, order, shared) == 24


def test_rows_with_common_prefix_are_balanced():
    lengths, order, shared = [40, 40, 12, 12, 12, 12], [*range(6)], [0, 10, 10, 10, 10, 10]
    micro_batches = split_shared(lengths, 1000, order, shared, 2)
    assert micro_batches == [[0, 2, 4], [1, 3, 5]]
    tokens = [count_computed_tokens(rows, lengths, order, shared) for rows in micro_batches]
    assert tokens == [44, 44]


@pytest.mark.parametrize(("is_padded", "costs"), [(False, [50, 50]), (True, [56, 48])])
def test_micro_batches_are_balanced(is_padded: bool, costs: list[int]) -> None:
    lengths = [12, 12, 12, 14, 10, 14, 14, 12]
    micro_batches = split(lengths, 60, is_padded)
    assert [compute_cost(lengths, rows, is_padded) for rows in micro_batches] == costs


def test_split_is_deterministic() -> None:
    lengths = [5, 9, 5, 9, 1]
    assert split_packed(lengths, 14) == split_packed(lengths, 14)
    assert split_packed(lengths, 14) == [[1, 4], [0, 2], [3]]


def test_rows_with_shared_prefix_are_grouped() -> None:
    # Rows 0 and 2 share 8 tokens, 1 and 3 nothing; in the order of `sort_by_prefix`.
    assert split_shared([10, 10, 10, 10], 12, [0, 2, 1, 3], [0, 0, 8, 0]) == [[0, 2], [1], [3]]
    assert split_packed([10, 10, 10, 10], 12) == [[0], [1], [2], [3]]
