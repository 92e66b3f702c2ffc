"""Attention of packed rows on a GPU, and the options of all attention in the fast step.

torch's `varlen_attn` (flash attention) is used where it supports the states and options, else SDPA
on padded segments. Keys and values of a shared prefix are not copied for each sequence below it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from packaging.version import Version
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftlevel.fast.packing import Range, Segment
from ftlevel.models.hardware import send
from ftlevel.models.upstream.tensors import (
    VarlenLengths,
    flash_attention,
    flash_attention_backward,
    is_on_gpu,
)


def softcapped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float,
    cap: float,
    causal: bool,
) -> tuple[Tensor, None]:
    """Returns softcapped attention (batch, queries, heads, head_dim), and None for the weights.

    `query` is (batch, heads, queries, head_dim), `key` and `value` are (batch, key heads, keys,
    head_dim), `mask` is (batch or 1, 1, queries, keys), True or 0 where visible. `causal` applies
    without a mask; a single query is the last token and sees every key.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    exact = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query.to(exact), key.to(exact).transpose(2, 3)) * scale
    scores = cap * torch.tanh(scores / cap)
    queries, keys = scores.shape[2:]
    if mask is None and causal and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = mask[..., :keys]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(exact).min)
        else:
            scores = scores + mask
    weights = functional.dropout(scores.softmax(-1).to(value.dtype), dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class AttentionOptions:
    """Options of an attention layer.

    A token sees keys at a distance below `window`. `cap` is the softcap of the scores (Gemma 2).
    """

    causal: bool = True
    window: int | None = None
    scale: float = 1.0
    dropout: float = 0.0
    cap: float | None = None


HAS_VARLEN = Version(torch.__version__) >= Version("2.12")
"""Whether torch's `varlen_attn` has windows, a scale and grouped-query heads."""

MAX_HEAD_DIM = 256
"""Maximum head_dim of flash attention."""

SMALL_MEMORY_CAPABILITIES = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities whose shared memory is too small for the backward pass of flash attention
with head_dim 193 to 224 (torch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
"""


def get_capability(tensor: Tensor) -> tuple[int, int]:
    """Returns the compute capability of the GPU of `tensor`; of an Ampere card for estimates."""
    if tensor.is_cuda:
        return torch.cuda.get_device_capability(tensor.device)
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)


def supports_varlen(states: Sequence[Tensor], options: AttentionOptions) -> bool:
    """Returns whether `varlen_attn` supports `options` and query, key and value (…, head_dim)."""
    query, key, value = states
    if not is_on_gpu(query) or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if options.dropout or options.cap or not HAS_VARLEN:
        return False
    capability, head_dim = get_capability(query), query.shape[-1]
    if not head_dim == key.shape[-1] == value.shape[-1]:
        return False
    if capability in SMALL_MEMORY_CAPABILITIES and 192 < head_dim <= 224:
        return False
    return head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM and capability >= (8, 0)


def activate_fa3(config: Any) -> str:
    """Make FlashAttention 3 torch's flash attention in this process, where that is possible.

    Returns the reason for display; empty if FlashAttention 2 stays: on a GPU other than Hopper,
    without the package flash_attn_3 or a torch that knows it, or if `config` has attention dropout,
    which FA3 does not support and torch does not check.
    """
    has_dropout = any("att" in name and "drop" in name and value
                      for name, value in config.to_dict().items())  # fmt: skip
    if has_dropout or not torch.cuda.is_available() or find_spec("flash_attn_interface") is None:
        return ""
    if torch.cuda.get_device_capability()[0] != 9:
        return ""
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
    except Exception:  # noqa: BLE001 - of a package built for another torch: FA2 is there
        return ""
    return "flash_attn_3 is installed"


@lru_cache(maxsize=8)
def get_lengths(
    segments: tuple[Segment, ...], device: torch.device, *, with_past: bool
) -> VarlenLengths:
    """Returns the lengths of `segments` as sequences of queries and of keys, past included or not.

    If they are equal, both are the same tensor, which torch requires for cuDNN from 2.15 on.
    """
    own = [segment.stop - segment.start for segment in segments]
    keys = [length + with_past * s.position for s, length in zip(segments, own, strict=True)]
    ends = _to_ends(own, device)
    return ends, ends if keys == own else _to_ends(keys, device), max(own), max(keys)


def _to_ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    return send(torch.tensor([0, *lengths]).cumsum(0).int(), device)


@lru_cache(maxsize=8)
def get_key_source(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    """Returns the positions of the keys of all segments, past included, (keys,)."""
    return send(_to_positions([r for s in segments for r in (*s.past, (s.start, s.stop))]), device)


def _to_positions(ranges: Sequence[Range]) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in ranges])


@dataclass(frozen=True)
class PastCall:
    """Attention of queries to prefixes, each prefix with the queries of all segments below it.

    Attributes:
        queries: (queries,) indices of the queries among the tokens of all segments.
        keys: (keys,) positions of the keys in the row; a key occurs once.
    """

    queries: Tensor
    keys: Tensor
    lengths: VarlenLengths

    def select(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the queries, keys and values of this call."""
        keys = self.keys
        return (
            query.index_select(0, self.queries),
            key.index_select(0, keys),
            value.index_select(0, keys),
        )


@lru_cache(maxsize=8)
def plan_past_calls(segments: tuple[Segment, ...], device: torch.device) -> tuple[PastCall, ...]:
    """Returns the calls in which segments attend to their past, one for each level of the tree."""
    calls, first = [], segments[0].start
    for level in range(max(len(segment.past) for segment in segments)):
        below: dict[Range, list[Range]] = defaultdict(list)
        for segment in segments:
            if len(segment.past) > level:
                below[segment.past[level]].append((segment.start - first, segment.stop - first))
        queries = [sum(stop - start for start, stop in ranges) for ranges in below.values()]
        keys = [stop - start for start, stop in below]
        ends = (_to_ends(queries, device), _to_ends(keys, device))
        calls.append(
            PastCall(
                send(_to_positions([r for ranges in below.values() for r in ranges]), device),
                send(_to_positions(list(below)), device),
                (*ends, max(queries), max(keys)),
            )
        )
    return tuple(calls)


def window_of(causal: bool, window: int | None) -> tuple[int, int]:
    """Returns how many keys before and after its own a query sees (-1: all), as kernels expect."""
    past = -1 if window is None else window - 1
    return past, 0 if causal else past


def varlen_attention(
    states: list[Tensor], segments: tuple[Segment, ...], options: AttentionOptions
) -> Tensor:
    """Returns attention within each of `segments`, (their tokens, heads, head_dim), on a GPU.

    `states` are queries (heads, tokens, head_dim), keys and values (key heads, tokens, head_dim),
    for which `supports_varlen` must be true. Tokens before the first segment are keys only.
    """
    query, key, value = (part.transpose(0, 1).contiguous() for part in states)
    query, device = query[segments[0].start :], query.device
    longest = max(segment.position + segment.stop - segment.start for segment in segments)
    window = None if options.window is None or options.window >= longest else options.window
    has_past = any(segment.past for segment in segments)
    lengths = get_lengths(segments, device, with_past=has_past and window is not None)
    if has_past and window is None:
        calls = plan_past_calls(segments, device)
        attended: Tensor = TreeAttention.apply(query, key, value, lengths, calls, options.scale)  # type: ignore[no-untyped-call]
        return attended
    if has_past:  # where a window begins in the past depends on the query
        source = get_key_source(segments, device)
        key, value = (Gather.apply(part, 0, source) for part in (key, value))  # type: ignore[no-untyped-call]
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        key,
        value,
        *lengths,
        scale=options.scale,
        window_size=window_of(options.causal, window),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast("Tensor", output)  # a tuple is returned only on request


class TreeAttention(torch.autograd.Function):
    """Attention in a prefix tree: each segment to itself, and to its past, merged by log-sum-exp.

        o = Σᵢ exp(ℓᵢ − ℓ) oᵢ,  ℓ = log Σᵢ exp ℓᵢ    for calls i with outputs oᵢ and LSE ℓᵢ

    With o and ℓ in place of oᵢ and ℓᵢ, the backward kernel of a call computes its part of the
    gradients, as in ring attention (arXiv 2310.01889). Keys are not copied for each sequence that
    shares them, and the kernel sums their gradients in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: VarlenLengths,
        calls: Sequence[PastCall],
        scale: float,
    ) -> Tensor:
        """Returns the output (queries, heads, head_dim).

        `query` is (queries, heads, head_dim), `key` and `value` are (tokens, key heads, head_dim);
        the queries are of the last tokens. `lengths` are those of the segments themselves.
        """
        own = (query, key[len(key) - len(query) :], value[len(value) - len(query) :])
        output, lse = flash_attention(*own, lengths, causal=True, scale=scale)
        exact = output.to(torch.promote_types(output.dtype, torch.float32))
        for call in calls:
            states = call.select(query, key, value)
            part, part_lse = flash_attention(*states, call.lengths, causal=False, scale=scale)
            before = lse.index_select(1, call.queries)
            total = torch.logaddexp(before, part_lse)
            kept, added = ((x - total).exp().t()[..., None] for x in (before, part_lse))
            merged = exact.index_select(0, call.queries).mul_(kept).add_(part * added)
            exact.index_copy_(0, call.queries, merged)
            lse.index_copy_(1, call.queries, total)
        output = exact.to(output.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.arguments = lengths, calls, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of `query`, `key` and `value`."""
        query, key, value, output, lse = ctx.saved_tensors
        calls: Sequence[PastCall]
        lengths, calls, scale = ctx.arguments
        gradient, first = gradient.contiguous(), len(key) - len(query)
        of_query, *of_own = flash_attention_backward(
            gradient, query, key[first:], value[first:], output, lse, lengths,
            causal=True, scale=scale,
        )  # fmt: skip
        of_key, of_value = (functional.pad(part, (0, 0, 0, 0, first, 0)) for part in of_own)
        for call in calls:
            at, states = call.queries, call.select(query, key, value)
            results = (output.index_select(0, at), lse.index_select(1, at))
            parts = flash_attention_backward(
                gradient.index_select(0, at), *states, *results, call.lengths,
                causal=False, scale=scale,
            )  # fmt: skip
            of_query.index_add_(0, at, parts[0])
            of_key.index_add_(0, call.keys, parts[1])
            of_value.index_add_(0, call.keys, parts[2])
        return of_query, of_key, of_value, None, None, None


class Gather(torch.autograd.Function):
    """`index_select` whose gradient is summed in float32; in 16 bits, each addition is rounded."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, dim: int, source: Tensor) -> Tensor:
        """Returns `states.index_select(dim, source)`."""
        ctx.save_for_backward(source)
        ctx.dim, ctx.shape = dim, states.shape
        return states.index_select(dim, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradient of `states`."""
        (source,) = ctx.saved_tensors
        exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        total = exact.new_zeros(ctx.shape).index_add_(ctx.dim, source, exact)
        return total.to(gradient.dtype), None, None


LengthPair = tuple[int, int]
"""Number of queries and keys of a segment."""


@dataclass(frozen=True)
class PaddedBatch:
    """Segments of similar length, padded to one batch.

    Attributes:
        queries, keys: (count, maximum) positions in the packed row, arbitrary for padding.
        mask: (count, 1, queries, keys), True where visible; if None, `causal` decides.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    causal: bool


@lru_cache(maxsize=8)
def pad_segments(
    segments: tuple[Segment, ...], causal: bool, window: int | None, device: torch.device
) -> tuple[tuple[PaddedBatch, ...], Tensor]:
    """Returns padded batches, and the index of each query in the concatenated batches.

    The queries are the tokens of `segments`; tokens before the first segment are keys only.
    """
    groups: dict[LengthPair, list[int]] = defaultdict(list)
    for number, segment in enumerate(segments):
        length, seen = _lengths(segment)
        groups[length.bit_length(), seen.bit_length()].append(number)
    batches, offset, first = list[PaddedBatch](), 0, segments[0].start
    positions = torch.empty(segments[-1].stop - first, dtype=torch.long)
    for numbers in groups.values():
        group = [segments[number] for number in numbers]
        batch = _pad(group, causal, window)
        for row, segment in enumerate(group):
            start, length = offset + row * batch.queries.shape[1], segment.stop - segment.start
            at = segment.start - first
            positions[at : at + length] = torch.arange(start, start + length)
        offset += batch.queries.numel()
        mask = None if batch.mask is None else send(batch.mask, device)
        batches.append(
            PaddedBatch(send(batch.queries, device), send(batch.keys, device), mask, batch.causal)
        )
    return tuple(batches), send(positions, device)


def _lengths(segment: Segment) -> LengthPair:
    length = segment.stop - segment.start
    return length, segment.position + length


def _pad(group: Sequence[Segment], causal: bool, window: int | None) -> PaddedBatch:
    lengths, seen = (torch.tensor(part) for part in zip(*map(_lengths, group), strict=True))
    longest, widest = int(lengths.max()), int(seen.max())
    queries = torch.zeros(len(group), longest, dtype=torch.long)
    keys = torch.zeros(len(group), widest, dtype=torch.long)
    for row, segment in enumerate(group):
        queries[row, : lengths[row]] = torch.arange(segment.start, segment.stop)
        spans = (*segment.past, (segment.start, segment.stop))
        keys[row, : seen[row]] = torch.cat([torch.arange(*range_) for range_ in spans])
    is_unmasked = bool((lengths == seen).all()) and (window is None or window > widest)
    if is_unmasked and (causal or bool((seen == widest).all())):
        return PaddedBatch(queries, keys, None, causal)
    at = torch.arange(widest)
    is_token = at < seen[:, None, None]  # (count, 1, keys)
    distance = ((seen - lengths)[:, None] + torch.arange(longest))[:, :, None] - at
    mask = is_token.expand(-1, longest, -1).clone()
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance.abs() < window
    # A padded query must see some key, or its softmax is NaN.
    mask |= (torch.arange(longest) >= lengths[:, None])[:, :, None] & is_token
    return PaddedBatch(queries, keys, mask[:, None], causal)


def padded_attention(
    states: list[Tensor], segments: tuple[Segment, ...], options: AttentionOptions
) -> Tensor:
    """Returns attention as `varlen_attention` does, with torch's SDPA on padded batches."""
    batches, positions = pad_segments(segments, options.causal, options.window, states[0].device)
    groups, outputs = len(states[0]) // len(states[1]), []
    # Only then is a key in several sequences.
    select = Gather.apply if any(segment.past for segment in segments) else torch.index_select
    for batch in batches:
        query, key, value = (
            select(part, 1, at.flatten()).view(len(part), *at.shape, -1).transpose(0, 1)
            for part, at in zip(states, (batch.queries, batch.keys, batch.keys), strict=True)
        )
        if options.cap:
            attended, _ = softcapped_attention(
                query,
                key,
                value,
                batch.mask,
                options.dropout,
                options.scale,
                options.cap,
                batch.causal,
            )
            outputs.append(attended.flatten(0, 1))
            continue
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=batch.mask,
            dropout_p=options.dropout,
            is_causal=batch.causal and batch.mask is None,
            scale=options.scale,
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, positions)
