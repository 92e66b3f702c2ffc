"""Tests that varlen kernels receive the right sequences, and on a GPU compute the right attention.

The stand-in for the kernel is written as documented: causal from the end, with a window to each
side; its backward pass takes any output and LSE, as torch's does.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention
from torch.nn.attention import varlen

from ftlevel.fast import gpu_attention as gpu
from ftlevel.fast.blocked_attention import BlockedAttention, split_queries
from ftlevel.fast.gpu_attention import (
    AttentionOptions,
    Gather,
    activate_fa3,
    get_lengths,
    padded_attention,
    supports_varlen,
    varlen_attention,
    window_of,
)
from ftlevel.fast.packing import Segment
from ftlevel.models.upstream.tensors import VarlenLengths

ROWS = (Segment(0, 5), Segment(5, 60), Segment(60, 61), Segment(61, 200))
TREE = (
    Segment(0, 50),
    Segment(50, 60, ((0, 50),)),
    Segment(60, 100, ((0, 50), (50, 60))),
    Segment(100, 120, ((0, 50),)),
)
SHARED = (
    Segment(40, 50, ((0, 40),)),
    Segment(50, 70, ((0, 40), (40, 50))),
    Segment(70, 75, ((0, 40),)),
)
"""Segments after a prefix of 40 tokens that has no queries."""
CASES = [(ROWS, True, None), (ROWS, False, None), (ROWS, True, 9), (ROWS, False, 9),
         (TREE, True, None), (TREE, True, 9), (TREE, True, 120),
         (SHARED, True, None), (SHARED, True, 9)]  # fmt: skip


def create_states(
    tokens: int, dtype: torch.dtype, device: str = "cpu", dim: int = 16
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(tokens, heads, dim, dtype=dtype, device=device).transpose(0, 1).requires_grad_()
        for heads in (4, 2, 2)
    ]


def iterate_scores(
    query: torch.Tensor, key: torch.Tensor, lengths: VarlenLengths, window: tuple[int, int],
    scale: float,
) -> Iterator[tuple[slice, slice, torch.Tensor]]:  # fmt: skip
    """Yield the queries, keys and scores (heads, queries, keys) of each sequence."""
    query_ends, key_ends, *maxima = lengths
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert maxima == [int(ends.diff().max()) for ends in (query_ends, key_ends)]
    assert (len(query), len(key)) == (query_ends[-1], key_ends[-1])
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    spans = [torch.stack([ends[:-1], ends[1:]], 1).tolist() for ends in (query_ends, key_ends)]
    for (a, b), (c, d) in zip(*spans, strict=True):
        scores = torch.einsum("qhw,khw->hqk", query[a:b], key[c:d]) * scale
        distance = torch.arange(d - c) - (torch.arange(b - a) + (d - c) - (b - a))[:, None]
        for side, limit in zip((-distance, distance), window, strict=True):
            if limit >= 0:
                scores = scores.masked_fill(side > limit, -torch.inf)
        yield slice(a, b), slice(c, d), scores


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: VarlenLengths, *,
    causal: bool, scale: float, window: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    window, values = window or window_of(causal, None), value.repeat_interleave(2, dim=1)
    outputs, lses = [], []
    for _, keys, scores in iterate_scores(query, key, lengths, window, scale):
        outputs.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), values[keys]))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(lses, 1)


def flash_attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    output: torch.Tensor, lse: torch.Tensor, lengths: VarlenLengths, *, causal: bool, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    assert lse.is_contiguous()
    wide_key, wide_value = (part.repeat_interleave(2, dim=1) for part in (key, value))
    of_query, of_key, of_value = (torch.zeros_like(x) for x in (query, wide_key, wide_value))
    delta = (gradient * output).sum(-1).t()
    for at, keys, scores in iterate_scores(query, key, lengths, window_of(causal, None), scale):
        p = (scores - lse[:, at, None]).exp()
        of_p = torch.einsum("qhw,khw->hqk", gradient[at], wide_value[keys])
        of_scores = p * (of_p - delta[:, at, None]) * scale
        of_query[at] = torch.einsum("hqk,khw->qhw", of_scores, wide_key[keys])
        of_key[keys] = torch.einsum("hqk,qhw->khw", of_scores, query[at])
        of_value[keys] = torch.einsum("hqk,qhw->khw", p, gradient[at])
    return of_query, *(x.view(len(key), -1, 2, x.shape[-1]).sum(2) for x in (of_key, of_value))


def varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor, max_q: int, max_k: int, *, return_aux: Any = None, scale: Any = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    assert enable_gqa
    assert return_aux is None
    lengths = (cu_seq_q, cu_seq_k, max_q, max_k)
    return flash_attention(
        query, key, value, lengths, causal=False, scale=scale, window=window_size
    )[0]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace torch's GPU kernels."""
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(gpu, "flash_attention", flash_attention)
    monkeypatch.setattr(gpu, "flash_attention_backward", flash_attention_backward)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("attention", [varlen_attention, padded_attention])
@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_attention_and_gradients_match_blocked_attention(segments, causal, window, attention):
    parts = create_states(segments[-1].stop, torch.float64)
    actual = attention(parts, segments, AttentionOptions(causal, window, 0.3))
    blocks = split_queries(segments, causal, window)
    expected = BlockedAttention.apply(*parts, blocks, 0.3, 0.0)[segments[0].start :]
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    gradients, exact = (torch.autograd.grad(x, parts, weights) for x in (actual, expected))
    first = segments[0].start  # the queries before are no one's
    torch.testing.assert_close(gradients[0][:, first:], exact[0][:, first:])
    torch.testing.assert_close(gradients[1:], exact[1:])


def test_keys_of_shared_prefix_are_not_copied():
    """Two prompts of 8 completions each: the keys of a call are each prompt once."""
    prompts = (Segment(0, 1000), Segment(1400, 2400))
    segments = []
    for prompt in prompts:
        past = ((prompt.start, prompt.stop),)
        starts = [prompt.stop + 50 * number for number in range(8)]
        segments += [prompt, *(Segment(start, start + 50, past) for start in starts)]
    (call,) = gpu.plan_past_calls(tuple(segments), torch.device("cpu"))
    assert call.keys.tolist() == [*range(1000), *range(1400, 2400)]
    assert call.queries.tolist() == [*range(1000, 1400), *range(2400, 2800)]
    ends = [part.tolist() for part in call.lengths[:2]]
    assert ends == [[0, 400, 800], [0, 1000, 2000]]


def test_equal_lengths_are_one_tensor():
    lengths = get_lengths(ROWS, torch.device("cpu"), with_past=False)
    assert lengths[0] is lengths[1], "cuDNN of torch 2.15 asks"
    tree = get_lengths(TREE, torch.device("cpu"), with_past=True)
    assert tree[1].diff().tolist() == [50, 60, 100, 70]


def test_gathered_gradients_are_summed_in_float32():
    states = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    source = torch.zeros(1000, dtype=torch.long)
    Gather.apply(states, 0, source).sum().backward()
    assert states.grad.item() == 1000  # additions in bfloat16 stop at 256


class CudaStates:
    """What `supports_varlen` reads of a tensor on a GPU."""

    is_cuda, device = True, "cuda"

    def __init__(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = (4, 8, head_dim), dtype


@pytest.mark.parametrize(
    ("capability", "head_dims", "dtype", "options", "is_supported"),
    [
        ((8, 0), (128, 128), torch.bfloat16, {}, True),
        ((9, 0), (64, 64), torch.float16, {"window": 9, "scale": 0.3}, True),
        ((7, 5), (64, 64), torch.float16, {}, False),
        ((8, 0), (128, 128), torch.float32, {}, False),
        ((8, 0), (128, 128), torch.bfloat16, {"dropout": 0.1}, False),
        ((8, 0), (256, 256), torch.bfloat16, {"cap": 50.0}, False),
        ((8, 0), (20, 20), torch.bfloat16, {}, False),
        ((8, 0), (264, 264), torch.bfloat16, {}, False),
        ((9, 0), (192, 128), torch.bfloat16, {}, False),  # DeepSeek's values are narrower
        ((8, 0), (200, 200), torch.bfloat16, {}, True),
        ((8, 6), (192, 192), torch.bfloat16, {}, True),
        ((8, 6), (200, 200), torch.bfloat16, {}, False),
        ((8, 9), (224, 224), torch.bfloat16, {}, False),
        ((12, 0), (224, 224), torch.bfloat16, {}, False),
        ((8, 9), (256, 256), torch.bfloat16, {}, True),
    ],
)
def test_supported_attention(capability, head_dims, dtype, options, is_supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    states: Any = [CudaStates(dim, dtype) for dim in (head_dims[0], *head_dims)]
    assert supports_varlen(states, AttentionOptions(**options)) is is_supported
    monkeypatch.setattr(gpu, "HAS_VARLEN", False)
    assert not supports_varlen(states, AttentionOptions(**options))
    assert not supports_varlen(create_states(8, torch.bfloat16), AttentionOptions())


@pytest.mark.parametrize(
    ("major", "installed", "attention_dropout", "error", "is_active"),
    [
        (9, True, 0.0, None, True),
        (8, True, 0.0, None, False),
        (10, True, 0.0, None, False),
        (9, False, 0.0, None, False),
        (9, True, 0.1, None, False),
        (9, True, 0.0, ImportError("undefined symbol"), False),
    ],
)
def test_fa3_is_activated_only_where_it_works(
    major, installed, attention_dropout, error, is_active, monkeypatch
):  # fmt: skip
    activated = []

    def activate(name: str) -> None:
        if error is not None:
            raise error
        activated.append(name)

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setattr(gpu, "find_spec", lambda _: object() if installed else None)
    config = types.SimpleNamespace(to_dict=lambda: {"attention_dropout": attention_dropout})
    assert activate_fa3(config) == ("flash_attn_3 is installed" if is_active else "")
    assert activated == (["FA3"] if is_active else [])


def test_torch_still_has_fa3():
    assert "FA3" in torch.nn.attention.list_flash_attention_impls()


@pytest.mark.gpu
@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_varlen_attention_on_gpu_matches_reference(segments, causal, window):
    parts = create_states(segments[-1].stop, torch.bfloat16, "cuda")
    assert supports_varlen(parts, AttentionOptions(causal, window, 0.3))
    actual = varlen_attention(parts, segments, AttentionOptions(causal, window, 0.3))
    exact = [part.detach().double().cpu().requires_grad_() for part in parts]
    blocks = split_queries(segments, causal, window)
    expected = BlockedAttention.apply(*exact, blocks, 0.3, 0.0)[segments[0].start :]
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, exact, weights)
    gradients = torch.autograd.grad(actual, parts, weights.to(actual))
    for a, b in zip((actual, *gradients), (expected, *expected_gradients), strict=True):
        assert (a.double().cpu() - b).norm() < 2e-2 * b.norm()
