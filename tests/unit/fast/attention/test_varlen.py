"""What the kernel of a GPU is told is the attention of sequences; on a GPU, it computes it.

The kernel's own meaning is written out here: causal from the end, a window to each side.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ftlevel.errors import InputError
from ftlevel.fast import gpu_attention as gpu
from ftlevel.fast.blocked_attention import BlockedAttention, split_queries
from ftlevel.fast.gpu_attention import (
    AttentionOptions,
    Lengths,
    VarlenKernel,
    get_installed_kernel,
    get_lengths,
    supports_attention,
    varlen_attention,
    window_of,
)
from ftlevel.fast.packing import Segment

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
    parts: list[torch.Tensor], lengths: Lengths, window: tuple[int, int], scale: float,
    cap: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    query, key, value = (part.transpose(0, 1) for part in parts)
    if lengths.source is not None:
        key, value = key[lengths.source], value[lengths.source]
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    outputs = []
    spans = [torch.stack([ends[:-1], ends[1:]], 1).tolist()
             for ends in (lengths.queries, lengths.keys)]  # fmt: skip
    for (a, b), (c, d) in zip(*spans, strict=True):
        scores = torch.einsum("qhw,khw->hqk", query[a:b], key[c:d]) * scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        distance = torch.arange(d - c) - (torch.arange(b - a) + (d - c) - (b - a))[:, None]
        for side, reach in zip((-distance, distance), window, strict=True):
            if reach >= 0:
                scores = scores.masked_fill(side > reach, -torch.inf)
        outputs.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), value[c:d]))
    assert lengths.max_queries == max(b - a for a, b in spans[0])
    assert lengths.max_keys == max(d - c for c, d in spans[1])
    return torch.cat(outputs)


@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_the_kernel_is_told_the_attention_of_sequences(
    segments: tuple[Segment, ...], causal: bool, window: int | None
) -> None:
    parts = states(segments[-1].stop, torch.float64)
    lengths = get_lengths(segments, torch.device("cpu"))
    assert lengths.queries.dtype == lengths.keys.dtype == torch.int32
    assert (lengths.queries is lengths.keys) is (segments is ROWS), "cuDNN of torch 2.15 asks"
    found = as_documented(parts, lengths, window_of(causal, window), 0.3)
    blocks = split_queries(segments, causal, window)
    expected = BlockedAttention.apply(*parts, blocks, 0.3, 0.0)
    torch.testing.assert_close(found, expected)


def test_a_cpu_is_not_served() -> None:
    assert not supports_attention(states(8, torch.bfloat16)[0], AttentionOptions(scale=0.25))


def as_in_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):  # fmt: skip
    return _computed(locals(), (-1, 0) if is_causal else (-1, -1), query.shape[-1] ** -0.5)


def as_in_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1),
):  # fmt: skip
    return _computed(locals(), window_size, scale)


def as_in_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    return _computed(locals(), window_size, scale, expects_groups=enable_gqa)


def _computed(
    told: dict[str, Any], window: tuple[int, int], scale: float, expects_groups: bool = False
) -> torch.Tensor:
    query, key, value = told["query"], told["key"], told["value"]
    assert expects_groups or query.shape[1] == key.shape[1] == value.shape[1]
    lengths = Lengths(told["cu_seq_q"], told["cu_seq_k"], told["max_q"], told["max_k"], None)
    parts = [part.transpose(0, 1) for part in (query, key, value)]
    return as_documented(parts, lengths, window, scale)


SIGNATURES = {
    "2.10": (as_in_2_10, VarlenKernel(windows=False, scales=False, groups=False)),
    "2.11": (as_in_2_11, VarlenKernel(windows=True, scales=True, groups=False)),
    "2.12": (as_in_2_12, VarlenKernel(windows=True, scales=True, groups=True)),
    "2.13": (as_in_2_12, VarlenKernel(windows=True, scales=True, groups=True)),
    "2.15": (as_in_2_12, VarlenKernel(windows=True, scales=True, groups=True)),
}
"""torch → the signature of its `varlen_attn`, and what is read off it; 2.8 and 2.9 have none."""


@pytest.mark.parametrize("version", SIGNATURES)
@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_each_torch_is_told_what_its_kernel_takes(
    segments: tuple[Segment, ...],
    causal: bool,
    window: int | None,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function, expected = SIGNATURES[version]
    stand_in(monkeypatch, function)
    assert VarlenKernel.read(function) == get_installed_kernel() == expected
    parts = states(segments[-1].stop, torch.float64)
    scale = 0.25 if version == "2.10" else 0.3  # 16 elements of a head: its own scale
    if not expected.supports(AttentionOptions(causal, window, scale), 16):
        assert (version, window) == ("2.10", 9)
        return
    found = varlen_attention(parts, segments, AttentionOptions(causal, window, scale))
    blocks = split_queries(segments, causal, window)
    torch.testing.assert_close(found, BlockedAttention.apply(*parts, blocks, scale, 0.0))


def test_the_kernel_of_2_10_has_a_scale_of_its_own() -> None:
    kernel = SIGNATURES["2.10"][1]
    assert kernel.supports(AttentionOptions(scale=0.125), 64)
    assert not kernel.supports(AttentionOptions(scale=0.3), 64)
    assert not kernel.supports(AttentionOptions(window=9, scale=0.125), 64)


def test_a_torch_without_the_kernel_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    get_installed_kernel.cache_clear()
    assert get_installed_kernel() is None
    get_installed_kernel.cache_clear()


def stand_in(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    """Let `function` be the `varlen_attn` of the installed torch."""
    module = types.ModuleType("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", function, raising=False)
    monkeypatch.setattr(module, "__spec__", types.SimpleNamespace(), raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    get_installed_kernel.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_the_kernel_computes_it(
    segments: tuple[Segment, ...], causal: bool, window: int | None
) -> None:
    parts = states(segments[-1].stop, torch.bfloat16, "cuda")
    assert supports_attention(parts[0], AttentionOptions(causal, window, 0.3))
    found = varlen_attention(parts, segments, AttentionOptions(causal, window, 0.3))
    exact = [part.detach().double().cpu().requires_grad_() for part in parts]
    expected = BlockedAttention.apply(*exact, split_queries(segments, causal, window), 0.3, 0.0)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, exact, weights)
    gradients = torch.autograd.grad(found, parts, weights.to(found))
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        assert (one.double().cpu() - other).norm() < 2e-2 * other.norm()


class Fetched:
    """Stands for the package kernels: what was asked for, and flash attention as documented."""

    def __init__(self, all_keys: int | None, *, as_pair: bool) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.all_keys, self.as_pair = all_keys, as_pair

    def get_kernel(self, repository: str, **which: Any) -> Any:
        """Return the module of a kernel."""
        self.asked.append((repository, which))
        if "nothing" in repository:
            raise FileNotFoundError("no build for torch 2.13")
        everything = (self.all_keys, self.all_keys)

        def flash_attn_varlen_func(
            q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
            max_seqlen_k: int, softmax_scale: Any = None, causal: bool = False,
            window_size: Any = everything, softcap: float = 0.0,
        ) -> Any:  # fmt: skip
            left, right = (-1 if side == self.all_keys else side for side in window_size)
            assert left != -2
            assert right is not None
            lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None)
            window = (left, 0 if causal else right)
            parts = [part.transpose(0, 1) for part in (q, k, v)]
            made = as_documented(parts, lengths, window, softmax_scale, softcap)
            return (made, None) if self.as_pair else made

        names = {} if "empty" in repository else {"flash_attn_varlen_func": flash_attn_varlen_func}
        return types.SimpleNamespace(**names)


@pytest.fixture(params=[(-1, True), (None, False)], ids=["FA3", "FA4"])
def fetched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fetched:
    package = Fetched(request.param[0], as_pair=request.param[1])
    monkeypatch.setitem(sys.modules, "kernels", package)
    monkeypatch.setattr(gpu, "find_spec", lambda _: object())
    gpu.fetch_kernel.cache_clear()
    return package


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_a_kernel_of_the_hub_is_told_the_attention_of_sequences(
    segments: tuple[Segment, ...], causal: bool, window: int | None, cap: float | None,
    fetched: Fetched,
) -> None:  # fmt: skip
    options = AttentionOptions(causal, window, 0.3, cap=cap)
    kernel = gpu.fetch_kernel("someone/flash@1")
    assert kernel is gpu.fetch_kernel("someone/flash@1")
    assert fetched.asked == [("someone/flash", {"version": 1})]
    parts = states(segments[-1].stop, torch.float64)
    found = varlen_attention(parts, segments, options, kernel)
    blocks = split_queries(segments, causal, window)
    torch.testing.assert_close(found, BlockedAttention.apply(*parts, blocks, 0.3, 0.0, cap))
    assert kernel.supports(options, 16)
    old = gpu.HubKernel.read(lambda q: q)
    assert old.supports(AttentionOptions(), 16)
    assert not old.supports(AttentionOptions(cap=0.7), 16)
    assert not old.supports(AttentionOptions(window=9), 16)
    assert VarlenKernel(True, True, True).supports(options, 16) is (cap is None)


def test_a_kernel_that_is_not_there_is_refused(
    fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no someone/nothing@abc123 for this machine: no build"):
        gpu.fetch_kernel("someone/nothing@abc123")
    assert fetched.asked == [("someone/nothing", {"revision": "abc123"})]
    with pytest.raises(InputError, match="someone/empty@2 has no flash_attn_varlen_func"):
        gpu.fetch_kernel("someone/empty@2")
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install kernels"):
        gpu.fetch_kernel("someone/flash@1")
