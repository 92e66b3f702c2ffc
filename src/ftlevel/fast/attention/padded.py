"""Attention of a row on a GPU that its flash kernel does not serve: a few calls of SDPA a row.

Sequences of like length are padded to the longest of them and computed by one call: what torch
before 2.10, a card before Ampere, float32 or dropout in attention leave. Calls are as many as there
are powers of two among the lengths, at most, and not one a sequence; places are at most twice the
tokens.

Causal sequences of their own need no mask, since padding stands behind every token. With a mask the
memory-efficient kernel has no grouped queries, so each query head gets its keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional

from ftlevel.fast.attention.capped import attend_capped
from ftlevel.fast.attention.options import AttentionOptions
from ftlevel.fast.packing.layout import Segment
from ftlevel.models.hardware import send

Lengths = tuple[int, int]
"""Queries and keys of a segment."""


@dataclass(frozen=True)
class PaddedBatch:
    """Segments of like length.

    Attributes:
        queries: (count, most queries) where each stands in the row; padding is some token.
        keys: (count, most keys), likewise.
        mask: (count, 1, most queries, most keys), True where a query sees a key; None where
            causality alone decides, or nothing does.
        causal: whether a query sees only what is before it, where there is no mask.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None
    causal: bool


@lru_cache(maxsize=8)
def pad_segments(
    segments: tuple[Segment, ...], causal: bool, window: int | None, device: torch.device
) -> tuple[tuple[PaddedBatch, ...], torch.Tensor]:
    """Return the batches on `device`, and (tokens,) the place of each token among all of them.

    Args:
        segments: of the row.
        causal: whether a query sees only itself and what is before it.
        window: a query sees fewer than this many tokens to each side, itself included.
        device: where they are computed.
    """
    groups: dict[Lengths, list[int]] = defaultdict(list)
    for number, segment in enumerate(segments):
        own, seen = _lengths(segment)
        groups[own.bit_length(), seen.bit_length()].append(number)
    batches, begin = list[PaddedBatch](), 0
    places = torch.empty(segments[-1].stop, dtype=torch.long)
    for numbers in groups.values():
        group = [segments[number] for number in numbers]
        batch = _pad(group, causal, window)
        for row, segment in enumerate(group):
            start, own = begin + row * batch.queries.shape[1], segment.stop - segment.start
            places[segment.start : segment.stop] = torch.arange(start, start + own)
        begin += batch.queries.numel()
        mask = None if batch.mask is None else send(batch.mask, device)
        batches.append(
            PaddedBatch(send(batch.queries, device), send(batch.keys, device), mask, batch.causal)
        )
    return tuple(batches), send(places, device)


def _lengths(segment: Segment) -> Lengths:
    own = segment.stop - segment.start
    return own, segment.position + own


def _pad(group: Sequence[Segment], causal: bool, window: int | None) -> PaddedBatch:
    own, seen = (torch.tensor(part) for part in zip(*map(_lengths, group), strict=True))
    most, widest = int(own.max()), int(seen.max())
    queries = torch.zeros(len(group), most, dtype=torch.long)
    keys = torch.zeros(len(group), widest, dtype=torch.long)
    for row, segment in enumerate(group):
        queries[row, : own[row]] = torch.arange(segment.start, segment.stop)
        ranges = (*segment.past, (segment.start, segment.stop))
        keys[row, : seen[row]] = torch.cat([torch.arange(*range_) for range_ in ranges])
    is_plain = bool((own == seen).all()) and (window is None or window > widest)
    if is_plain and (causal or bool((seen == widest).all())):
        return PaddedBatch(queries, keys, None, causal)
    at = torch.arange(widest)
    inside = at < seen[:, None, None]  # (count, 1, keys)
    distance = ((seen - own)[:, None] + torch.arange(most))[:, :, None] - at
    mask = inside.expand(-1, most, -1).clone()
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance.abs() < window
    # A query of padding must see something, or its softmax is not a number.
    mask |= (torch.arange(most) >= own[:, None])[:, :, None] & inside
    return PaddedBatch(queries, keys, mask[:, None], causal)


def attend_padded(
    states: list[torch.Tensor], segments: tuple[Segment, ...], options: AttentionOptions
) -> torch.Tensor:
    """Return (tokens, heads, head_dim).

    Args:
        states: queries (heads, tokens, head_dim), keys and values (key heads, tokens, head_dim).
        segments: of the row, which is all of the tokens.
        options: of the attention.
    """
    device = states[0].device
    batches, places = pad_segments(segments, options.causal, options.window, device)
    groups, outputs = len(states[0]) // len(states[1]), []
    for batch in batches:
        query, key, value = (
            part.index_select(1, at.flatten()).view(len(part), *at.shape, -1).transpose(0, 1)
            for part, at in zip(states, (batch.queries, batch.keys, batch.keys), strict=True)
        )
        if options.cap:
            made, _ = attend_capped(
                query,
                key,
                value,
                batch.mask,
                options.dropout,
                options.scale,
                options.cap,
                batch.causal,
            )
            outputs.append(made.flatten(0, 1))
            continue
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        made = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=batch.mask, dropout_p=options.dropout,
            is_causal=batch.causal and batch.mask is None, scale=options.scale,
        )  # fmt: skip
        outputs.append(made.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, places)
