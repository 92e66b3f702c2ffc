"""Rows are cut into passes: each once, within the budget, in as few as that allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlevel.speed.passes import cut_packed, cut_padded, cut_shared

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def cut(lengths: list[int], budget: int, is_padded: bool) -> list[list[int]]:
    return cut_padded(lengths, budget) if is_padded else cut_packed(lengths, budget)


def cost(lengths: list[int], rows: list[int], is_padded: bool) -> int:
    own = [lengths[row] for row in rows]
    return max(own) * len(own) if is_padded else sum(own)


@given(LENGTHS, st.integers(1, 100), st.booleans())
def test_every_row_is_in_one_pass_within_the_budget(
    lengths: list[int], budget: int, is_padded: bool
) -> None:
    passes = cut(lengths, budget, is_padded)
    assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
    for rows in passes:
        assert len(rows) == 1 or cost(lengths, rows, is_padded) <= budget
    flat = [lengths[row] for rows in passes for row in rows]
    assert flat == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("is_padded", "costs"), [(False, [54, 46]), (True, [56, 48])])
def test_passes_are_even(is_padded: bool, costs: list[int]) -> None:
    lengths = [12, 12, 12, 14, 10, 14, 14, 12]
    passes = cut(lengths, 60, is_padded)
    assert [cost(lengths, rows, is_padded) for rows in passes] == costs


def test_the_same_rows_are_cut_the_same() -> None:
    lengths = [5, 9, 5, 9, 1]
    assert cut_packed(lengths, 14) == cut_packed(lengths, 14)
    assert cut_packed(lengths, 14) == [[1], [3], [0, 2, 4]]


def test_rows_that_share_cost_less_together() -> None:
    # Rows 0 and 2 share 8 tokens, 1 and 3 nothing; order as of `sort_by_prefix`.
    assert cut_shared([10, 10, 10, 10], 12, [0, 2, 1, 3], [0, 0, 8, 0]) == [[0, 2], [1], [3]]
    assert cut_packed([10, 10, 10, 10], 12) == [[0], [1], [2], [3]]
