"""Attention by blocks is attention: values and gradients against SDPA, sequence by sequence."""

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
# A prefix of 150 tokens, a branch with a branch of its own, and a second branch.
TREE = (
    Segment(0, 150),
    Segment(150, 160, ((0, 150),)),
    Segment(160, 300, ((0, 150), (150, 160))),
    Segment(300, 320, ((0, 150),)),
)


def states(tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    # As models give them: (heads, tokens, width) of memory that is (tokens, heads, width).
    return [
        torch.randn(tokens, heads, WIDTH, dtype=dtype).transpose(0, 1).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def by_sdpa(
    parts: list[torch.Tensor], segments: tuple[Segment, ...], causal: bool, window: int | None,
    cap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    query, key, value = parts
    outputs = []
    for segment in segments:
        at = [i for a, b in (*segment.past, (segment.start, segment.stop)) for i in range(a, b)]
        seen = create_visibility_mask(
            segment.position, segment.stop - segment.start, 0, len(at), causal, window
        )
        if cap:  # SDPA has none: written out
            own = query[:, segment.start : segment.stop].unflatten(0, (GROUPS, -1))
            scores = cap * torch.tanh(0.3 * own @ key[:, None, at].transpose(2, 3) / cap)
            scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
            outputs.append((scores.softmax(-1) @ value[:, None, at]).flatten(0, 1))
            continue
        outputs.append(functional.scaled_dot_product_attention(
            query[None, :, segment.start : segment.stop], key[None, :, at], value[None, :, at],
            attn_mask=seen, scale=0.3, enable_gqa=True,
        )[0])  # fmt: skip
    return torch.cat(outputs, dim=1).transpose(0, 1)


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize(
    ("segments", "causal", "window"),
    [(SEQUENCES, True, None), (SEQUENCES, False, None), (SEQUENCES, True, 40),
     (SEQUENCES, False, 40), (TREE, True, None), (TREE, True, 30)],
)  # fmt: skip
def test_blocks_equal_sdpa(
    segments: tuple[Segment, ...], causal: bool, window: int | None, cap: float | None
) -> None:
    tokens = segments[-1].stop
    assert any(block.width > MAX_SAVED_KEYS for block in split_queries(segments, causal, None))
    parts = states(tokens)
    weights = torch.randn(tokens, HEADS, WIDTH, dtype=torch.float64)
    expected = by_sdpa(parts, segments, causal, window, cap)
    wanted = torch.autograd.grad(expected, parts, weights)
    blocks = split_queries(segments, causal, window)
    found = BlockedAttention.apply(*parts, blocks, 0.3, 0.0, cap)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, parts, weights), wanted)


def test_a_block_holds_no_key_that_no_query_sees() -> None:
    blocks = split_queries((Segment(0, 1000),), causal=True, window=None)
    assert [block.width for block in blocks] == [128, 256, 384, 512, 640, 768, 896, 1000]
    windowed = split_queries((Segment(0, 1000),), causal=True, window=64)
    assert {block.width for block in windowed[1:-1]} == {QUERIES + 63}


def test_dropout_hides_in_the_backward_pass_what_it_hid_in_the_forward_pass() -> None:
    segments = (Segment(0, 300),)
    parts = states(300)
    blocks = split_queries(segments, False, None)
    torch.manual_seed(3)
    kept = BlockedAttention.apply(*parts, blocks, 0.3, 0.5)
    (of_value,) = torch.autograd.grad(kept.sum(), parts[2])
    # Linear in the values: the gradient tells the output again, if the same places are hidden.
    torch.testing.assert_close((of_value * parts[2]).sum(), kept.sum())
    assert (kept - BlockedAttention.apply(*parts, blocks, 0.3, 0.0)).abs().max() > 0.01
