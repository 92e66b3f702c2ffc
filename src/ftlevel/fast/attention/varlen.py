"""Attention of a whole row by one flash kernel on a CUDA GPU, through `torch.nn.attention.varlen`.

Each segment's queries see the keys of its past and its own, which are gathered before one another.
The kernel aligns a causal mask at the last query and the last key (flash-attention 2.1), as a
segment whose past comes first wants it; so trees of prefixes need no kernel of their own.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch

from ftlevel.fast.packing.layout import Segment

WIDEST_HEAD = 256
"""Elements of a head at most, in flash attention."""


@dataclass(frozen=True)
class Lengths:
    """What the kernel is told of a row.

    Attributes:
        queries: (segments + 1,) int32, where the queries of each segment begin, and the end.
        keys: (segments + 1,) int32, the same of its keys among the gathered ones.
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
    source = None
    if any(segment.past for segment in segments):
        ranges = [r for s in segments for r in (*s.past, (s.start, s.stop))]
        source = torch.cat([torch.arange(start, stop) for start, stop in ranges]).to(device)
    ends = [torch.tensor([0, *part]).cumsum(0).to(device, torch.int32) for part in (own, seen)]
    return Lengths(ends[0], ends[1], max(own), max(seen), source)


def window_of(causal: bool, window: int | None) -> tuple[int, int]:
    """Return how many keys a query sees before and behind its own, -1 for all.

    Args:
        causal: whether none behind.
        window: a query sees fewer than this many tokens to each side, itself included.
    """
    reach = -1 if window is None else window - 1
    return reach, 0 if causal else reach


def can_serve(query: torch.Tensor, dropout: float) -> bool:
    """Whether the kernel computes `query` (heads, tokens, head_dim) here."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and dropout == 0.0
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= WIDEST_HEAD
        and importlib.util.find_spec("torch.nn.attention.varlen") is not None  # torch 2.10
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def attend_varlen(
    states: list[torch.Tensor],
    segments: tuple[Segment, ...],
    causal: bool,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Return (tokens, heads, head_dim).

    Args:
        states: queries (heads, tokens, head_dim), keys and values (key heads, tokens, head_dim).
        segments: of the row.
        causal: as of `window_of`.
        window: as of `window_of`.
        scale: of the scores.
    """
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (part.transpose(0, 1) for part in states)
    lengths = measure(segments, query.device)
    if lengths.source is not None:
        key, value = (part.index_select(0, lengths.source) for part in (key, value))
    attended = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), lengths.queries, lengths.keys,
        lengths.most_queries, lengths.most_keys, scale=scale, window_size=window_of(causal, window),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return cast("torch.Tensor", attended)  # the pair is returned to those who ask for it
