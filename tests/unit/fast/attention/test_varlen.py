"""What the kernel of a GPU is told is the attention of sequences; on a GPU, it computes it.

The kernel's own meaning is written out here: causal from the end, a window to each side.
"""

from __future__ import annotations

import pytest
import torch

from ftlevel.fast.attention.blocked import BlockedAttention, split_queries
from ftlevel.fast.attention.varlen import Lengths, attend_varlen, can_serve, measure, window_of
from ftlevel.fast.packing.layout import Segment

ROWS = (Segment(0, 5), Segment(5, 60), Segment(60, 61), Segment(61, 200))
TREE = (
    Segment(0, 50),
    Segment(50, 60, ((0, 50),)),
    Segment(60, 100, ((0, 50), (50, 60))),
    Segment(100, 120, ((0, 50),)),
)
CASES = [(ROWS, True, None), (ROWS, False, None), (ROWS, True, 9), (ROWS, False, 9),
         (TREE, True, None), (TREE, True, 9)]  # fmt: skip


def states(tokens: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(tokens, heads, 16, dtype=dtype, device=device).transpose(0, 1).requires_grad_()
        for heads in (4, 2, 2)
    ]


def as_documented(
    parts: list[torch.Tensor], lengths: Lengths, window: tuple[int, int], scale: float
) -> torch.Tensor:
    query, key, value = (part.transpose(0, 1) for part in parts)
    if lengths.source is not None:
        key, value = key[lengths.source], value[lengths.source]
    key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
    outputs = []
    spans = [torch.stack([ends[:-1], ends[1:]], 1).tolist()
             for ends in (lengths.queries, lengths.keys)]  # fmt: skip
    for (a, b), (c, d) in zip(*spans, strict=True):
        scores = torch.einsum("qhw,khw->hqk", query[a:b], key[c:d]) * scale
        distance = torch.arange(d - c) - (torch.arange(b - a) + (d - c) - (b - a))[:, None]
        for side, reach in zip((-distance, distance), window, strict=True):
            if reach >= 0:
                scores = scores.masked_fill(side > reach, -torch.inf)
        outputs.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), value[c:d]))
    assert lengths.most_queries == max(b - a for a, b in spans[0])
    assert lengths.most_keys == max(d - c for c, d in spans[1])
    return torch.cat(outputs)


@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_the_kernel_is_told_the_attention_of_sequences(
    segments: tuple[Segment, ...], causal: bool, window: int | None
) -> None:
    parts = states(segments[-1].stop, torch.float64)
    lengths = measure(segments, torch.device("cpu"))
    assert lengths.queries.dtype == lengths.keys.dtype == torch.int32
    found = as_documented(parts, lengths, window_of(causal, window), 0.3)
    blocks = split_queries(segments, causal, window)
    expected = BlockedAttention.apply(*parts, blocks, 0.3, 0.0)
    torch.testing.assert_close(found, expected)


def test_a_cpu_is_not_served() -> None:
    assert not can_serve(states(8, torch.bfloat16)[0], 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_the_kernel_computes_it(
    segments: tuple[Segment, ...], causal: bool, window: int | None
) -> None:
    parts = states(segments[-1].stop, torch.bfloat16, "cuda")
    assert can_serve(parts[0], 0.0)
    found = attend_varlen(parts, segments, causal, window, 0.3)
    exact = [part.detach().double().cpu().requires_grad_() for part in parts]
    expected = BlockedAttention.apply(*exact, split_queries(segments, causal, window), 0.3, 0.0)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, exact, weights)
    gradients = torch.autograd.grad(found, parts, weights.to(found))
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        assert (one.double().cpu() - other).norm() < 2e-2 * other.norm()
