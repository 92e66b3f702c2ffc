"""Rows are cut into passes: each once, within the budget, in as few as that allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlevel.speed.passes import cut_passes

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def cost(lengths: list[int], rows: list[int], is_padded: bool) -> int:
    own = [lengths[row] for row in rows]
    return max(own) * len(own) if is_padded else sum(own)


@given(LENGTHS, st.integers(1, 100), st.booleans())
def test_every_row_is_in_one_pass_within_the_budget(
    lengths: list[int], budget: int, is_padded: bool
) -> None:
    passes = cut_passes(lengths, budget, is_padded=is_padded)
    assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
    for rows in passes:
        assert len(rows) == 1 or cost(lengths, rows, is_padded) <= budget
    flat = [lengths[row] for rows in passes for row in rows]
    assert flat == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("is_padded", "costs"), [(False, [54, 46]), (True, [56, 48])])
def test_passes_are_even(is_padded: bool, costs: list[int]) -> None:
    lengths = [12, 12, 12, 14, 10, 14, 14, 12]
    passes = cut_passes(lengths, 60, is_padded=is_padded)
    assert [cost(lengths, rows, is_padded) for rows in passes] == costs


def test_the_same_rows_are_cut_the_same() -> None:
    lengths = [5, 9, 5, 9, 1]
    assert cut_passes(lengths, 14, is_padded=False) == cut_passes(lengths, 14, is_padded=False)
    assert cut_passes(lengths, 14, is_padded=False) == [[1], [3], [0, 2, 4]]
