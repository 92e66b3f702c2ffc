"""Short sequences in one batched product have the attention of blocks: values and gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ftlevel.fast.blocked_attention import BlockedAttention, split_queries
from ftlevel.fast.packed_attention import (
    MAX_PADDING,
    MAX_SHORT,
    ShortAttention,
    are_short,
    batch_sequences,
)
from ftlevel.fast.packing import Segment

HEADS, GROUPS, WIDTH = 4, 2, 8


def rows(*lengths: int) -> tuple[Segment, ...]:
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return tuple(Segment(a, b) for a, b in pairwise(ends))


def states(tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(tokens, heads, WIDTH, dtype=dtype).transpose(0, 1).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (20, 19, 17, 12, 5, 5, 1), (1,), (MAX_SHORT, 3)])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 4), (False, 4)])
def test_it_equals_blocks(
    lengths: tuple[int, ...], causal: bool, window: int | None, cap: float | None
) -> None:
    segments = rows(*lengths)
    parts = states(segments[-1].stop)
    weights = torch.randn(segments[-1].stop, HEADS, WIDTH, dtype=torch.float64)
    how = (0.3, 0.0, cap)
    expected = BlockedAttention.apply(*parts, split_queries(segments, causal, window), *how)
    found = ShortAttention.apply(*parts, batch_sequences(segments, causal, window), *how)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, parts, weights), torch.autograd.grad(expected, parts, weights)
    )


def test_bfloat16_is_as_near_as_blocks() -> None:
    segments = rows(20, 19, 12, 5)
    exact = BlockedAttention.apply(*states(56), split_queries(segments, True, None), 0.3, 0.0)
    parts = states(56, torch.bfloat16)
    blocks = BlockedAttention.apply(*parts, split_queries(segments, True, None), 0.3, 0.0)
    short = ShortAttention.apply(*parts, batch_sequences(segments, True, None), 0.3, 0.0)
    apart = [(part.double() - exact).norm().item() for part in (short, blocks)]
    assert apart[0] < 1.1 * apart[1]


def test_sequences_of_like_length_are_padded_together() -> None:
    batches = batch_sequences(rows(20, 19, 18, 6, 6, 5), True, None)
    assert [(b.count, b.longest) for b in batches] == [(3, 20), (3, 6)]
    assert all(b.count * b.longest <= MAX_PADDING * (b.stop - b.start) for b in batches)


def test_dropout_hides_in_the_backward_pass_what_it_hid_in_the_forward_pass() -> None:
    segments = rows(9, 8, 3)
    parts = states(20)
    batches = batch_sequences(segments, False, None)
    torch.manual_seed(3)
    kept = ShortAttention.apply(*parts, batches, 0.3, 0.5)
    (of_value,) = torch.autograd.grad(kept.sum(), parts[2])
    torch.testing.assert_close((of_value * parts[2]).sum(), kept.sum())
    assert (kept - ShortAttention.apply(*parts, batches, 0.3, 0.0)).abs().max() > 0.01


def test_what_is_short() -> None:
    assert are_short(rows(5, MAX_SHORT))
    assert not are_short(rows(5, MAX_SHORT + 1))
    assert not are_short((Segment(0, 5), Segment(5, 8, ((0, 5),))))
