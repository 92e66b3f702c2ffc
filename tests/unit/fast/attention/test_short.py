"""Tests that batched attention of short sequences matches blocked attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ftlevel.fast.blocked_attention import BlockedAttention, split_queries
from ftlevel.fast.packed_attention import (
    MAX_PADDING,
    MAX_SHORT,
    ShortAttention,
    attend,
    batch_sequences,
    count_long,
)
from ftlevel.fast.packing import PackedLayout, Segment, using_layout

HEADS, GROUPS, WIDTH = 4, 2, 8


def create_segments(*lengths: int) -> tuple[Segment, ...]:
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return tuple(Segment(a, b) for a, b in pairwise(ends))


def create_states(tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(tokens, heads, WIDTH, dtype=dtype).transpose(0, 1).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (20, 19, 17, 12, 5, 5, 1), (1,), (MAX_SHORT, 3)])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 4), (False, 4)])
def test_short_attention_matches_blocked_attention(lengths, causal, window, cap):
    segments = create_segments(*lengths)
    parts = create_states(segments[-1].stop)
    weights = torch.randn(segments[-1].stop, HEADS, WIDTH, dtype=torch.float64)
    options = (0.3, 0.0, cap)
    expected = BlockedAttention.apply(*parts, split_queries(segments, causal, window), *options)
    actual = ShortAttention.apply(*parts, batch_sequences(segments, causal, window), *options)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, parts, weights), torch.autograd.grad(expected, parts, weights)
    )


def test_bfloat16_error_is_close_to_blocked_attention():
    segments = create_segments(20, 19, 12, 5)
    blocks, batches = split_queries(segments, True, None), batch_sequences(segments, True, None)
    exact = BlockedAttention.apply(*create_states(56), blocks, 0.3, 0.0)
    parts = create_states(56, torch.bfloat16)
    blocked = BlockedAttention.apply(*parts, blocks, 0.3, 0.0)
    short = ShortAttention.apply(*parts, batches, 0.3, 0.0)
    errors = [(part.double() - exact).norm().item() for part in (short, blocked)]
    assert errors[0] < 1.1 * errors[1]


def test_sequences_of_similar_length_are_batched():
    batches = batch_sequences(create_segments(20, 19, 18, 6, 6, 5), True, None)
    assert [(b.count, b.longest) for b in batches] == [(3, 20), (3, 6)]
    assert all(b.count * b.longest <= MAX_PADDING * (b.stop - b.start) for b in batches)


def test_dropout_mask_is_same_in_backward():
    segments = create_segments(9, 8, 3)
    parts = create_states(20)
    batches = batch_sequences(segments, False, None)
    torch.manual_seed(3)
    dropped_output = ShortAttention.apply(*parts, batches, 0.3, 0.5)
    (value_gradient,) = torch.autograd.grad(dropped_output.sum(), parts[2])
    torch.testing.assert_close((value_gradient * parts[2]).sum(), dropped_output.sum())
    assert (dropped_output - ShortAttention.apply(*parts, batches, 0.3, 0.0)).abs().max() > 0.01


def test_count_long():
    assert count_long(create_segments(5, MAX_SHORT)) == 0
    assert count_long(create_segments(MAX_SHORT + 1, 5, MAX_SHORT + 2, 5, 5)) == 3
    assert count_long((Segment(0, 5), Segment(5, 8, ((0, 5),)), Segment(8, 9))) == 2


PREFIXED = (Segment(0, 9), Segment(9, 12, ((0, 9),)), Segment(12, 80), Segment(80, 99))


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 4)])
@pytest.mark.parametrize(
    "segments", [create_segments(MAX_SHORT + 6, 3, 20, 19, 5), create_segments(70), PREFIXED]
)
def test_rows_of_long_and_short_sequences_match_blocked_attention(segments, causal, window, cap):
    causal = causal or segments is PREFIXED  # prefixes need causal attention
    tokens = segments[-1].stop
    parts, weights = create_states(tokens), torch.randn(tokens, HEADS, WIDTH, dtype=torch.float64)
    blocks = split_queries(segments, causal, window)
    expected = BlockedAttention.apply(*parts, blocks, 0.3, 0.0, cap)
    options = {"scaling": 0.3, "is_causal": causal, "sliding_window": window, "softcap": cap}
    layout = PackedLayout(1, tokens, torch.arange(tokens), torch.arange(tokens), segments)
    with using_layout(layout):
        output, _ = attend(torch.nn.Module(), *(part[None] for part in parts), None, **options)
    torch.testing.assert_close(output[0], expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, parts, weights[None]),
        torch.autograd.grad(expected, parts, weights),
    )
