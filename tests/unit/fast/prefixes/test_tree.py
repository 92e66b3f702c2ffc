"""Tests that a prefix tree contains every row in order and computes shared prefixes once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftlevel.fast.prefixes import (
    common_prefix_length,
    create_prefix_tree,
    shared_fraction,
    sort_by_prefix,
)

# Few different tokens, so that rows share prefixes of several lengths by chance.
ROWS = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=14), min_size=1, max_size=8)


def pad_rows(rows: list[list[int]]) -> torch.Tensor:
    seq = max(map(len, rows))
    return torch.tensor([row + [0] * (seq - len(row)) for row in rows])


@given(ROWS, st.integers(1, 5))
def test_tree_contains_every_row(rows, min_length):
    order, _ = sort_by_prefix(rows, min_length)
    rows = [rows[i] for i in order]
    layout = create_prefix_tree(rows, min_length)
    ids = pad_rows(rows)
    tokens = layout.pack(ids[..., None].repeat(1, 1, 2))[0, :, 0]
    assert (layout.batch, layout.seq) == ids.shape
    assert torch.equal(tokens, ids.flatten()[layout.source])
    unpacked = layout.unpack(tokens[None, :, None])[..., 0]
    assert torch.equal(unpacked[ids != 0], ids[ids != 0])
    assert layout.tokens <= sum(map(len, rows))
    assert sorted(set(layout.restore[(ids != 0).flatten()].tolist())) == list(range(layout.tokens))

    owner = {positions: s for s in layout.segments for positions in range(s.start, s.stop)}
    for index, row in enumerate(rows):
        positions = layout.restore.view(layout.batch, layout.seq)[index, : len(row)].tolist()
        last = owner[positions[-1]]
        # The last token of the row attends to the row: its past, and its segment up to itself.
        visible = [i for a, b in last.past for i in range(a, b)] + list(
            range(last.start, positions[-1] + 1)
        )
        assert visible == positions
        assert last.position == len(row) - (positions[-1] + 1 - last.start)
    assert [s.start for s in layout.segments] == [0, *(s.stop for s in layout.segments[:-1])]
    assert all(b <= s.start for s in layout.segments for _, b in s.past), "parents come first"


@given(ROWS, st.lists(st.integers(1, 2), min_size=1, max_size=9), st.integers(1, 5))
def test_tree_after_shared_prefix_contains_every_row(ends, shared_prefix, min_length):
    rows = sorted(shared_prefix + end for end in ends)
    layout, ids, before = (
        create_prefix_tree(rows, min_length, len(shared_prefix)),
        pad_rows(rows),
        len(shared_prefix),
    )
    assert (layout.batch, layout.seq, layout.before) == (*ids.shape, before)
    after_prefix = (torch.arange(layout.seq) >= before) & (ids != 0)
    assert sorted(set(layout.restore[after_prefix.flatten()].tolist())) == list(
        range(layout.tokens)
    )
    assert bool((layout.column >= before).all())
    tokens = layout.pack(ids[..., None].repeat(1, 1, 2))[0, :, 0]
    assert torch.equal(
        layout.unpack(tokens[None, :, None])[..., 0][after_prefix], ids[after_prefix]
    )
    owner = {positions: s for s in layout.segments for positions in range(s.start, s.stop)}
    for index, row in enumerate(rows):
        positions = layout.restore.view(layout.batch, layout.seq)[index, before : len(row)] + before
        last = owner[positions.tolist()[-1]]
        visible = [i for a, b in last.past for i in range(a, b)] + list(
            range(last.start, positions[-1] + 1)
        )
        assert visible == [*range(before), *positions.tolist()]


def test_nested_prefixes_are_computed_once():
    rows = [[1] * 40 + [2] * 40 + [3, 4], [1] * 40 + [2] * 40 + [5], [1] * 40 + [6] * 3, [7, 8]]
    order, shared = sort_by_prefix(rows)
    assert order == [0, 1, 2, 3]
    assert shared == [0, 80, 40, 0]
    layout = create_prefix_tree(rows)
    assert [(s.start, s.stop, s.past) for s in layout.segments] == [
        (0, 40, ()),
        (40, 80, ((0, 40),)),
        (80, 82, ((0, 40), (40, 80))),
        (82, 83, ((0, 40), (40, 80))),
        (83, 86, ((0, 40),)),
        (86, 88, ()),
    ]
    assert shared_fraction(rows) == pytest.approx(120 / sum(map(len, rows)))


def test_equal_rows_are_computed_once():
    rows = [[1] * 50] * 3
    layout = create_prefix_tree(rows)
    assert layout.tokens == 50
    assert layout.restore.tolist() == list(range(50)) * 3


def test_short_prefix_is_not_shared():
    rows = [[1] * 31 + [2], [1] * 31 + [3]]
    assert create_prefix_tree(rows).tokens == 64
    assert shared_fraction(rows) == 0


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common_prefix_length(a, b):
    common = common_prefix_length(a, b)
    assert a[:common] == b[:common]
    assert common == min(len(a), len(b)) or a[common] != b[common]
