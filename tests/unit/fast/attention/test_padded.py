"""Tests that padded SDPA calls match blocked attention, with few calls for any lengths."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional

from ftlevel.fast.blocked_attention import BlockedAttention, split_queries
from ftlevel.fast.gpu_attention import (
    AttentionOptions,
    pad_segments,
    padded_attention,
    softcapped_attention,
)
from ftlevel.fast.packing import Segment

ROWS = tuple(Segment(a, b) for a, b in pairwise((0, 5, 60, 61, 200, 207, 330)))
TREE = (
    Segment(0, 10),
    Segment(10, 50, ((0, 10),)),
    Segment(50, 60, ((0, 10), (10, 50))),
    Segment(60, 100, ((0, 10), (10, 50), (50, 60))),
    Segment(100, 120, ((0, 10), (10, 50))),
)

CASES = [(ROWS, True, None), (ROWS, False, None), (ROWS, True, 9), (ROWS, False, 9),
         (TREE, True, None), (TREE, True, 9)]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_padded_attention_matches_blocked_attention(segments, causal, window, cap, device):
    torch.manual_seed(0)
    tensor = {"dtype": torch.float64, "device": device, "requires_grad": True}
    parts = [torch.randn(heads, segments[-1].stop, 8, **tensor) for heads in (4, 2, 2)]
    actual = padded_attention(parts, segments, AttentionOptions(causal, window, 0.3, cap=cap))
    exact = [part.detach().cpu().requires_grad_() for part in parts]
    blocks = split_queries(segments, causal, window)
    expected = BlockedAttention.apply(*exact, blocks, 0.3, 0.0, cap)
    torch.testing.assert_close(actual.cpu(), expected)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, parts, weights.to(device))
    for a, b in zip(gradients, torch.autograd.grad(expected, exact, weights), strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_equal_sequences_need_one_sdpa_call(monkeypatch):
    calls: list[dict[str, Any]] = []
    original = functional.scaled_dot_product_attention

    def record_call(*parts: torch.Tensor, **settings: Any) -> torch.Tensor:
        calls.append(settings)
        return original(*parts, **settings)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record_call)
    segments = tuple(Segment(start, start + 128) for start in range(0, 64 * 128, 128))
    parts = [torch.randn(heads, 64 * 128, 8) for heads in (4, 2, 2)]
    padded_attention(parts, segments, AttentionOptions(scale=0.3))
    assert len(calls) == 1
    assert calls[0]["attn_mask"] is None
    assert calls[0]["is_causal"]


def test_padding_at_most_doubles_tokens():
    generator, stop, segments = torch.Generator().manual_seed(0), 0, []
    for length in torch.randint(1, 700, (60,), generator=generator).tolist():
        segments.append(Segment(stop, stop + length))
        stop += length
    batches, _ = pad_segments(tuple(segments), True, None, torch.device("cpu"))
    assert sum(batch.queries.numel() for batch in batches) < 2 * stop
    assert len(batches) <= 10


@pytest.mark.parametrize("queries", [1, 7])
def test_softcapped_attention_is_accurate_under_autocast(queries):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, count, 8) for heads, count in
                         ((4, queries), (2, 7), (2, 7)))  # fmt: skip
    visible = torch.ones(2, 1, queries, 7, dtype=torch.bool).tril(7 - queries)
    visible[1, ..., :2] = False
    visible[1, ..., 2] = True
    exact_states = [
        part.double().repeat_interleave(4 // part.shape[1], 1) for part in (query, key, value)
    ]
    logits = 0.7 * torch.tanh(0.3 * exact_states[0] @ exact_states[1].transpose(2, 3) / 0.7)
    probabilities = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = (probabilities @ exact_states[2]).transpose(1, 2)
    masks = (visible, torch.zeros(visible.shape).masked_fill(~visible, -torch.inf))
    for mask in masks:
        with torch.autocast("cpu", torch.bfloat16):
            actual, _ = softcapped_attention(query, key, value, mask, 0.0, 0.3, 0.7, True)
        assert (actual - expected).norm() <= 1e-2 * expected.norm()
        actual, _ = softcapped_attention(query, key, value, mask, 0.0, 0.3, 0.7, True)
        torch.testing.assert_close(actual, expected.float())
