"""Tests that varlen kernels receive the right sequences, and on a GPU compute the right attention.

The reference is written as documented: causal from the end, with a window to each side.
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


def create_states(tokens: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(tokens, heads, 16, dtype=dtype, device=device).transpose(0, 1).requires_grad_()
        for heads in (4, 2, 2)
    ]


def reference_attention(
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
        for side, limit in zip((-distance, distance), window, strict=True):
            if limit >= 0:
                scores = scores.masked_fill(side > limit, -torch.inf)
        outputs.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), value[c:d]))
    assert lengths.max_queries == max(b - a for a, b in spans[0])
    assert lengths.max_keys == max(d - c for c, d in spans[1])
    return torch.cat(outputs)


@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_lengths_and_window_describe_attention(
    segments: tuple[Segment, ...], causal: bool, window: int | None
) -> None:
    parts = create_states(segments[-1].stop, torch.float64)
    lengths = get_lengths(segments, torch.device("cpu"))
    assert lengths.queries.dtype == lengths.keys.dtype == torch.int32
    assert (lengths.queries is lengths.keys) is (segments is ROWS), "cuDNN of torch 2.15 asks"
    actual = reference_attention(parts, lengths, window_of(causal, window), 0.3)
    blocks = split_queries(segments, causal, window)
    expected = BlockedAttention.apply(*parts, blocks, 0.3, 0.0)
    torch.testing.assert_close(actual, expected)


def test_varlen_attention_is_not_supported_on_cpu() -> None:
    assert not supports_attention(create_states(8, torch.bfloat16)[0], AttentionOptions(scale=0.25))


def varlen_attn_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):  # fmt: skip
    return _compute(locals(), (-1, 0) if is_causal else (-1, -1), query.shape[-1] ** -0.5)


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1),
):  # fmt: skip
    return _compute(locals(), window_size, scale)


def varlen_attn_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    return _compute(locals(), window_size, scale, expects_groups=enable_gqa)


def _compute(
    arguments: dict[str, Any], window: tuple[int, int], scale: float, expects_groups: bool = False
) -> torch.Tensor:
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    assert expects_groups or query.shape[1] == key.shape[1] == value.shape[1]
    lengths = Lengths(
        arguments["cu_seq_q"], arguments["cu_seq_k"], arguments["max_q"], arguments["max_k"], None
    )
    parts = [part.transpose(0, 1) for part in (query, key, value)]
    return reference_attention(parts, lengths, window, scale)


SIGNATURES = {
    "2.10": (varlen_attn_2_10, VarlenKernel(windows=False, scales=False, groups=False)),
    "2.11": (varlen_attn_2_11, VarlenKernel(windows=True, scales=True, groups=False)),
    "2.12": (varlen_attn_2_12, VarlenKernel(windows=True, scales=True, groups=True)),
    "2.13": (varlen_attn_2_12, VarlenKernel(windows=True, scales=True, groups=True)),
    "2.15": (varlen_attn_2_12, VarlenKernel(windows=True, scales=True, groups=True)),
}
"""torch version → signature of `varlen_attn` and its capabilities; 2.8 and 2.9 have none."""


@pytest.mark.parametrize("version", SIGNATURES)
@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_each_torch_version_gets_supported_arguments(
    segments: tuple[Segment, ...],
    causal: bool,
    window: int | None,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function, expected = SIGNATURES[version]
    replace_varlen_attn(monkeypatch, function)
    assert VarlenKernel.read(function) == get_installed_kernel() == expected
    parts = create_states(segments[-1].stop, torch.float64)
    scale = 0.25 if version == "2.10" else 0.3  # the default scale for head size 16
    if not expected.supports(AttentionOptions(causal, window, scale), 16):
        assert (version, window) == ("2.10", 9)
        return
    actual = varlen_attention(parts, segments, AttentionOptions(causal, window, scale))
    blocks = split_queries(segments, causal, window)
    torch.testing.assert_close(actual, BlockedAttention.apply(*parts, blocks, scale, 0.0))


def test_torch_2_10_kernel_supports_only_default_scale() -> None:
    kernel = SIGNATURES["2.10"][1]
    assert kernel.supports(AttentionOptions(scale=0.125), 64)
    assert not kernel.supports(AttentionOptions(scale=0.3), 64)
    assert not kernel.supports(AttentionOptions(window=9, scale=0.125), 64)


def test_torch_without_kernel_has_no_installed_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    get_installed_kernel.cache_clear()
    assert get_installed_kernel() is None
    get_installed_kernel.cache_clear()


def replace_varlen_attn(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    """Replace `varlen_attn` of the installed torch by `function`."""
    module = types.ModuleType("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", function, raising=False)
    monkeypatch.setattr(module, "__spec__", types.SimpleNamespace(), raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    get_installed_kernel.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_varlen_attention_on_gpu_matches_reference(
    segments: tuple[Segment, ...], causal: bool, window: int | None
) -> None:
    parts = create_states(segments[-1].stop, torch.bfloat16, "cuda")
    assert supports_attention(parts[0], AttentionOptions(causal, window, 0.3))
    actual = varlen_attention(parts, segments, AttentionOptions(causal, window, 0.3))
    exact = [part.detach().double().cpu().requires_grad_() for part in parts]
    expected = BlockedAttention.apply(*exact, split_queries(segments, causal, window), 0.3, 0.0)
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, exact, weights)
    gradients = torch.autograd.grad(actual, parts, weights.to(actual))
    for a, b in zip((actual, *gradients), (expected, *expected_gradients), strict=True):
        assert (a.double().cpu() - b).norm() < 2e-2 * b.norm()


class FakeKernelsPackage:
    """Stands in for the package kernels; records requests and computes documented attention."""

    def __init__(self, all_keys: int | None, *, as_pair: bool) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.all_keys, self.as_pair = all_keys, as_pair

    def get_kernel(self, repository: str, **version: Any) -> Any:
        """Return the module of a kernel."""
        self.requests.append((repository, version))
        if "nothing" in repository:
            raise FileNotFoundError("no build for torch 2.13")
        full_window = (self.all_keys, self.all_keys)

        def flash_attn_varlen_func(
            q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
            max_seqlen_k: int, softmax_scale: Any = None, causal: bool = False,
            window_size: Any = full_window, softcap: float = 0.0,
        ) -> Any:  # fmt: skip
            left, right = (-1 if side == self.all_keys else side for side in window_size)
            assert left != -2
            assert right is not None
            lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None)
            window = (left, 0 if causal else right)
            parts = [part.transpose(0, 1) for part in (q, k, v)]
            output = reference_attention(parts, lengths, window, softmax_scale, softcap)
            return (output, None) if self.as_pair else output

        members = (
            {} if "empty" in repository else {"flash_attn_varlen_func": flash_attn_varlen_func}
        )
        return types.SimpleNamespace(**members)


@pytest.fixture(params=[(-1, True), (None, False)], ids=["FA3", "FA4"])
def kernels_package(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> FakeKernelsPackage:
    package = FakeKernelsPackage(request.param[0], as_pair=request.param[1])
    monkeypatch.setitem(sys.modules, "kernels", package)
    monkeypatch.setattr(gpu, "find_spec", lambda _: object())
    gpu.fetch_kernel.cache_clear()
    return package


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize(("segments", "causal", "window"), CASES)
def test_hub_kernel_matches_reference(
    segments: tuple[Segment, ...], causal: bool, window: int | None, cap: float | None,
    kernels_package: FakeKernelsPackage,
) -> None:  # fmt: skip
    options = AttentionOptions(causal, window, 0.3, cap=cap)
    kernel = gpu.fetch_kernel("someone/flash@1")
    assert kernel is gpu.fetch_kernel("someone/flash@1")
    assert kernels_package.requests == [("someone/flash", {"version": 1})]
    parts = create_states(segments[-1].stop, torch.float64)
    actual = varlen_attention(parts, segments, options, kernel)
    blocks = split_queries(segments, causal, window)
    torch.testing.assert_close(actual, BlockedAttention.apply(*parts, blocks, 0.3, 0.0, cap))
    assert kernel.supports(options, 16)
    old = gpu.HubKernel.read(lambda q: q)
    assert old.supports(AttentionOptions(), 16)
    assert not old.supports(AttentionOptions(cap=0.7), 16)
    assert not old.supports(AttentionOptions(window=9), 16)
    assert VarlenKernel(True, True, True).supports(options, 16) is (cap is None)


def test_missing_hub_kernel_raises(
    kernels_package: FakeKernelsPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no someone/nothing@abc123 for this machine: no build"):
        gpu.fetch_kernel("someone/nothing@abc123")
    assert kernels_package.requests == [("someone/nothing", {"revision": "abc123"})]
    with pytest.raises(InputError, match="someone/empty@2 has no flash_attn_varlen_func"):
        gpu.fetch_kernel("someone/empty@2")
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install kernels"):
        gpu.fetch_kernel("someone/flash@1")
