"""Attention of a whole row by one flash kernel on a CUDA GPU, through `torch.nn.attention.varlen`.

Each segment's queries see the keys of its past and its own, which are gathered before one another.
The kernel aligns a causal mask at the last query and the last key (flash-attention 2.1), as a
segment whose past comes first wants it; so trees of prefixes need no kernel of their own.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast

import torch

from ftlevel.fast.attention.options import AttentionOptions
from ftlevel.fast.packing.layout import Segment
from ftlevel.models.hardware import send

WIDEST_HEAD = 256
"""Elements of a head at most, in flash attention."""


class FlashKernel(Protocol):
    """What attends to a whole row on a GPU."""

    def computes(self, options: AttentionOptions, head_dim: int) -> bool:
        """Whether it can be told of all `options`, for heads of `head_dim` elements."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Lengths,
        options: AttentionOptions,
    ) -> torch.Tensor:  # fmt: skip
        """Return (tokens, heads, head_dim), of contiguous states (tokens, heads, head_dim)."""


@dataclass(frozen=True)
class Kernel:
    """What torch's `varlen_attn` takes, by its signature.

    torch 2.8 and 2.9 have none. 2.10 takes `is_causal` and nothing of the three below, 2.11 all but
    `enable_gqa`, 2.12, 2.13 and 2.15 all. (torch/nn/attention/varlen.py of each.)

    Attributes:
        windows: whether it is told of a window; else of causality alone.
        scales: whether it is told of a scale; else it is 1 / sqrt(head_dim).
        groups: whether a key head may serve several query heads; else keys are expanded.
    """

    windows: bool
    scales: bool
    groups: bool

    @classmethod
    def read(cls, function: Callable[..., Any]) -> Kernel:
        """Return what `function` takes."""
        names = inspect.signature(function).parameters
        return cls("window_size" in names, "scale" in names, "enable_gqa" in names)

    def computes(self, options: AttentionOptions, head_dim: int) -> bool:
        """Whether it can be told of all `options`, for heads of `head_dim` elements."""
        is_usual = math.isclose(options.scale, head_dim**-0.5, rel_tol=1e-6)
        windows = self.windows or options.window is None
        return windows and (self.scales or is_usual) and options.cap is None

    def settings(
        self, causal: bool, window: int | None, scale: float, *, grouped: bool
    ) -> dict[str, Any]:
        """Return the keywords of a call that it `computes`."""
        told: dict[str, Any] = {"scale": scale} if self.scales else {}
        if self.groups:
            told["enable_gqa"] = grouped
        if self.windows:
            return {**told, "window_size": window_of(causal, window)}
        return {**told, "is_causal": causal}

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Lengths,
        options: AttentionOptions,
    ) -> torch.Tensor:  # fmt: skip
        """Return (tokens, heads, head_dim), as `FlashKernel` says."""
        from torch.nn.attention.varlen import varlen_attn

        groups = query.shape[1] // key.shape[1]
        if groups > 1 and not self.groups:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        attended = varlen_attn(
            query, key, value, lengths.queries, lengths.keys, lengths.most_queries,
            lengths.most_keys,
            **self.settings(options.causal, options.window, options.scale, grouped=groups > 1),
        )  # fmt: skip
        return cast("torch.Tensor", attended)  # the pair is returned to those who ask for it


@lru_cache(maxsize=1)
def installed_kernel() -> Kernel | None:
    """Return what the kernel of the installed torch takes; None where there is none."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return Kernel.read(varlen_attn)


@dataclass(frozen=True)
class Lengths:
    """What the kernel is told of a row.

    Attributes:
        queries: (segments + 1,) int32, where the queries of each segment begin, and the end.
        keys: (segments + 1,) int32, the same of its keys among the gathered ones; where they are
            the row, it is `queries` itself, by which torch from 2.15 on knows that cuDNN, whose
            causal mask begins at the first query and key, computes the same as flash attention.
        most_queries, most_keys: of a segment.
        source: (keys,) where each gathered key stands in the row; None where they are the row.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    most_queries: int
    most_keys: int
    source: torch.Tensor | None


@lru_cache(maxsize=8)
def measure(segments: tuple[Segment, ...], device: torch.device) -> Lengths:
    """Return the lengths of `segments`, on `device`."""
    own = [segment.stop - segment.start for segment in segments]
    seen = [segment.position + length for segment, length in zip(segments, own, strict=True)]
    queries = send(torch.tensor([0, *own]).cumsum(0).int(), device)
    if not any(segment.past for segment in segments):
        return Lengths(queries, queries, max(own), max(own), None)
    ranges = [r for s in segments for r in (*s.past, (s.start, s.stop))]
    source = send(torch.cat([torch.arange(start, stop) for start, stop in ranges]), device)
    keys = send(torch.tensor([0, *seen]).cumsum(0).int(), device)
    return Lengths(queries, keys, max(own), max(seen), source)


def window_of(causal: bool, window: int | None) -> tuple[int, int]:
    """Return how many keys a query sees before and behind its own, -1 for all.

    Args:
        causal: whether none behind.
        window: a query sees fewer than this many tokens to each side, itself included.
    """
    reach = -1 if window is None else window - 1
    return reach, 0 if causal else reach


def can_serve(
    query: torch.Tensor, options: AttentionOptions, kernel: FlashKernel | None = None
) -> bool:
    """Whether `kernel`, or torch's, computes `query` (heads, tokens, head_dim) here."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or options.dropout:
        return False
    head_dim, kernel = query.shape[-1], kernel or installed_kernel()
    return (
        kernel is not None
        and kernel.computes(options, head_dim)
        and head_dim % 8 == 0
        and head_dim <= WIDEST_HEAD
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def attend_varlen(
    states: list[torch.Tensor],
    segments: tuple[Segment, ...],
    options: AttentionOptions,
    kernel: FlashKernel | None = None,
) -> torch.Tensor:
    """Return (tokens, heads, head_dim), where `can_serve` says that it can.

    Args:
        states: queries (heads, tokens, head_dim), keys and values (key heads, tokens, head_dim).
        segments: of the row.
        options: of the attention; nothing is dropped.
        kernel: which; None is torch's.

    Raises:
        RuntimeError: there is none.
    """
    kernel = kernel or installed_kernel()
    if kernel is None:
        raise RuntimeError("this torch has no varlen_attn")
    query, key, value = (part.transpose(0, 1) for part in states)
    lengths = measure(segments, query.device)
    if lengths.source is not None:
        key, value = (part.index_select(0, lengths.source) for part in (key, value))
    rows = (query.contiguous(), key.contiguous(), value.contiguous())
    return kernel.attend(*rows, lengths, options)
