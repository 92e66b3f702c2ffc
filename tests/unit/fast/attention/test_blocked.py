"""Tests of blocked attention: values and gradients against SDPA for each sequence."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ftlevel.fast.blocked_attention import (
    MAX_SAVED_KEYS,
    QUERIES,
    BlockedAttention,
    create_visibility_mask,
    split_queries,
)
from ftlevel.fast.packing import Segment

HEADS, GROUPS, WIDTH = 4, 2, 16
SEQUENCES = (Segment(0, 5), Segment(5, 5 + QUERIES + 3), Segment(136, 137), Segment(137, 500))
# A prefix of 150 tokens, a branch with a sub-branch, and a second branch.
TREE = (
    Segment(0, 150),
    Segment(150, 160, ((0, 150),)),
    Segment(160, 300, ((0, 150), (150, 160))),
    Segment(300, 320, ((0, 150),)),
)


def create_states(tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    # As in models: (heads, tokens, width), stored as (tokens, heads, width).
    return [
        torch.randn(tokens, heads, WIDTH, dtype=dtype).transpose(0, 1).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def compute_with_sdpa(
    parts: list[torch.Tensor], segments: tuple[Segment, ...], causal: bool, window: int | None,
    cap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    query, key, value = parts
    outputs = []
    for segment in segments:
        seen = [i for a, b in (*segment.past, (segment.start, segment.stop)) for i in range(a, b)]
        mask = create_visibility_mask(
            segment.position, segment.stop - segment.start, len(seen), causal, window
        )
        if cap:  # SDPA has no soft cap
            own_query = query[:, segment.start : segment.stop].unflatten(0, (GROUPS, -1))
            scores = cap * torch.tanh(0.3 * own_query @ key[:, None, seen].transpose(2, 3) / cap)
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            outputs.append((scores.softmax(-1) @ value[:, None, seen]).flatten(0, 1))
            continue
        outputs.append(functional.scaled_dot_product_attention(
            query[None, :, segment.start : segment.stop], key[None, :, seen], value[None, :, seen],
            attn_mask=mask, scale=0.3, enable_gqa=True,
        )[0])  # fmt: skip
    return torch.cat(outputs, dim=1).transpose(0, 1)


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize(
    ("segments", "causal", "window"),
    [(SEQUENCES, True, None), (SEQUENCES, False, None), (SEQUENCES, True, 40),
     (SEQUENCES, False, 40), (TREE, True, None), (TREE, True, 30)],
)  # fmt: skip
def test_blocked_attention_matches_sdpa(segments, causal, window, cap):
    tokens = segments[-1].stop
    assert any(block.width > MAX_SAVED_KEYS for block in split_queries(segments, causal, None))
    parts = create_states(tokens)
    weights = torch.randn(tokens, HEADS, WIDTH, dtype=torch.float64)
    expected = compute_with_sdpa(parts, segments, causal, window, cap)
    expected_gradients = torch.autograd.grad(expected, parts, weights)
    blocks = split_queries(segments, causal, window)
    actual = BlockedAttention.apply(*parts, blocks, 0.3, 0.0, cap)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, parts, weights), expected_gradients)


def test_blocks_contain_only_visible_keys():
    blocks = split_queries((Segment(0, 1000),), causal=True, window=None)
    assert [block.width for block in blocks] == [128, 256, 384, 512, 640, 768, 896, 1000]
    windowed = split_queries((Segment(0, 1000),), causal=True, window=64)
    assert {block.width for block in windowed[1:-1]} == {QUERIES + 63}


def test_dropout_mask_is_same_in_backward():
    segments = (Segment(0, 300),)
    parts = create_states(300)
    blocks = split_queries(segments, False, None)
    torch.manual_seed(3)
    dropped_output = BlockedAttention.apply(*parts, blocks, 0.3, 0.5)
    (value_gradient,) = torch.autograd.grad(dropped_output.sum(), parts[2])
    # Linear in the values: the gradient gives the output if the same positions are dropped.
    torch.testing.assert_close((value_gradient * parts[2]).sum(), dropped_output.sum())
    assert (dropped_output - BlockedAttention.apply(*parts, blocks, 0.3, 0.0)).abs().max() > 0.01
