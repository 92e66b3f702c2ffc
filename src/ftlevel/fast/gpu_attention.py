"""Attention of packed rows on a GPU, and the options of all attention in the fast step."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from ftlevel.errors import InputError
from ftlevel.fast.packing import Segment
from ftlevel.models.hardware import send


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


MAX_HEAD_DIM = 256
"""Maximum head_dim of flash attention."""


class FlashKernel(Protocol):
    """Interface of GPU kernels that compute the attention of a whole packed row in one call."""

    def supports(self, options: AttentionOptions, head_dim: int) -> bool:
        """Returns whether the kernel supports `options` for heads of `head_dim`."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, options: AttentionOptions
    ) -> Tensor:
        """Returns the output (tokens, heads, head_dim) for contiguous tensors of that layout."""


@dataclass(frozen=True)
class VarlenKernel:
    """Kernel `varlen_attn` of torch, and which options the installed version supports.

    torch 2.8 and 2.9 do not have it. Options: only `is_causal` in 2.10, all but `enable_gqa` in
    2.11, all in 2.12, 2.13 and 2.15 (torch/nn/attention/varlen.py). Without `scales` the scale is 1
    / sqrt(head_dim); without `groups` keys are repeated for each query head.
    """

    windows: bool
    scales: bool
    groups: bool

    @classmethod
    def read(cls, function: Callable[..., Any]) -> VarlenKernel:
        """Returns the kernel of `function`, with supported options read from its signature."""
        names = inspect.signature(function).parameters
        return cls("window_size" in names, "scale" in names, "enable_gqa" in names)

    def supports(self, options: AttentionOptions, head_dim: int) -> bool:
        is_default_scale = math.isclose(options.scale, head_dim**-0.5, rel_tol=1e-6)
        has_window = self.windows or options.window is None
        return has_window and (self.scales or is_default_scale) and options.cap is None

    def get_kwargs(
        self, causal: bool, window: int | None, scale: float, *, grouped: bool
    ) -> dict[str, Any]:
        """Returns keyword arguments for `varlen_attn`; `grouped`: fewer key than query heads."""
        kwargs: dict[str, Any] = {"scale": scale} if self.scales else {}
        if self.groups:
            kwargs["enable_gqa"] = grouped
        if self.windows:
            return {**kwargs, "window_size": window_of(causal, window)}
        return {**kwargs, "is_causal": causal}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, options: AttentionOptions
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        groups = query.shape[1] // key.shape[1]
        if groups > 1 and not self.groups:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        output = varlen_attn(
            query,
            key,
            value,
            lengths.queries,
            lengths.keys,
            lengths.max_queries,
            lengths.max_keys,
            **self.get_kwargs(options.causal, options.window, options.scale, grouped=groups > 1),
        )
        return cast("Tensor", output)  # a tuple is returned only on request


@lru_cache(maxsize=1)
def get_installed_kernel() -> VarlenKernel | None:
    """Returns torch's `varlen_attn` as a `VarlenKernel`; None if this torch lacks it."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return VarlenKernel.read(varlen_attn)


@dataclass(frozen=True)
class Lengths:
    """Cumulative lengths of the segments (sequences) of a packed row, as kernels expect them.

    Attributes:
        queries: (segments + 1,) int32.
        keys: (segments + 1,) int32, past included; without any past, `queries` itself, which torch
            requires for cuDNN from 2.15 on.
        max_queries, max_keys: maximum per segment.
        source: (keys,) packed position of each gathered key; None if no segment has a past.
    """

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int
    source: Tensor | None


@lru_cache(maxsize=8)
def get_lengths(segments: tuple[Segment, ...], device: torch.device) -> Lengths:
    """Returns the cumulative lengths of `segments` as tensors on `device`."""
    lengths = [segment.stop - segment.start for segment in segments]
    num_keys = [
        segment.position + length for segment, length in zip(segments, lengths, strict=True)
    ]
    queries = send(torch.tensor([0, *lengths]).cumsum(0).int(), device)
    if not any(segment.past for segment in segments):
        return Lengths(queries, queries, max(lengths), max(lengths), None)
    spans = [r for s in segments for r in (*s.past, (s.start, s.stop))]
    source = send(torch.cat([torch.arange(start, stop) for start, stop in spans]), device)
    keys = send(torch.tensor([0, *num_keys]).cumsum(0).int(), device)
    return Lengths(queries, keys, max(lengths), max(num_keys), source)


def window_of(causal: bool, window: int | None) -> tuple[int, int]:
    """Returns how many keys before and after its own a query sees (-1: all), as kernels expect."""
    past = -1 if window is None else window - 1
    return past, 0 if causal else past


def supports_attention(
    query: Tensor, options: AttentionOptions, kernel: FlashKernel | None = None
) -> bool:
    """Returns whether `kernel` (None: torch's) supports `options` and a `query` (…, head_dim)."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or options.dropout:
        return False
    head_dim, kernel = query.shape[-1], kernel or get_installed_kernel()
    return (
        kernel is not None
        and kernel.supports(options, head_dim)
        and head_dim % 8 == 0
        and head_dim <= MAX_HEAD_DIM
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def varlen_attention(
    states: list[Tensor],
    segments: tuple[Segment, ...],
    options: AttentionOptions,
    kernel: FlashKernel | None = None,
) -> Tensor:
    """Returns attention within each of `segments`, (tokens, heads, head_dim), by a GPU kernel.

    `states` are queries (heads, tokens, head_dim), keys and values (key heads, tokens, head_dim),
    for which `supports_attention` must be true.
    """
    kernel = kernel or get_installed_kernel()
    if kernel is None:
        raise RuntimeError("this torch has no varlen_attn")
    query, key, value = (part.transpose(0, 1) for part in states)
    lengths = get_lengths(segments, query.device)
    if lengths.source is not None:
        key, value = (part.index_select(0, lengths.source) for part in (key, value))
    rows = (query.contiguous(), key.contiguous(), value.contiguous())
    return kernel.attend(*rows, lengths, options)


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
    """Returns padded batches, and (tokens,) each token's index in the concatenated batches."""
    groups: dict[LengthPair, list[int]] = defaultdict(list)
    for number, segment in enumerate(segments):
        length, seen = _lengths(segment)
        groups[length.bit_length(), seen.bit_length()].append(number)
    batches, offset = list[PaddedBatch](), 0
    positions = torch.empty(segments[-1].stop, dtype=torch.long)
    for numbers in groups.values():
        group = [segments[number] for number in numbers]
        batch = _pad(group, causal, window)
        for row, segment in enumerate(group):
            start, length = offset + row * batch.queries.shape[1], segment.stop - segment.start
            positions[segment.start : segment.stop] = torch.arange(start, start + length)
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
    for batch in batches:
        query, key, value = (
            part.index_select(1, at.flatten()).view(len(part), *at.shape, -1).transpose(0, 1)
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


FUNCTION = "flash_attn_varlen_func"


@dataclass(frozen=True)
class HubKernel:
    """Kernel from the Hub; `all_keys` is its argument for no window (FA4: None, others: -1)."""

    function: Callable[..., Any]
    caps: bool
    windows: bool
    all_keys: int | None

    @classmethod
    def read(cls, function: Callable[..., Any]) -> HubKernel:
        """Returns the kernel of `function`, with supported options read from its signature."""
        names = inspect.signature(function).parameters
        windows = "window_size" in names
        all_keys = names["window_size"].default[0] if windows else None
        return cls(function, "softcap" in names, windows, all_keys)

    def supports(self, options: AttentionOptions, head_dim: int) -> bool:
        is_supported = (self.caps or options.cap is None) and (
            self.windows or options.window is None
        )
        return is_supported and head_dim <= MAX_HEAD_DIM

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, options: AttentionOptions
    ) -> Tensor:
        kwargs: dict[str, Any] = {"softmax_scale": options.scale, "causal": options.causal}
        if options.cap is not None:
            kwargs["softcap"] = options.cap
        if options.window is not None:
            left, right = window_of(options.causal, options.window)
            kwargs["window_size"] = (left, self.all_keys if right < 0 else right)
        output = self.function(
            query,
            key,
            value,
            cu_seqlens_q=lengths.queries,
            cu_seqlens_k=lengths.keys,
            max_seqlen_q=lengths.max_queries,
            max_seqlen_k=lengths.max_keys,
            **kwargs,
        )
        return output[0] if isinstance(output, tuple) else output


@lru_cache(maxsize=4)
def fetch_kernel(name: str) -> HubKernel:
    """Load the Hub kernel `name`, OWNER/NAME@VERSION; InputError if loading fails."""
    if find_spec("kernels") is None:
        raise InputError(
            f"speed.attention_kernel {name} is fetched by the package kernels, which is not "
            "installed. pip install kernels, or drop it."
        )
    from kernels import get_kernel

    repository, _, version = name.partition("@")
    version_kwargs: dict[str, Any] = (
        {"version": int(version)} if version.isdigit() else {"revision": version}
    )
    try:
        module = get_kernel(repository, **version_kwargs)
    except Exception as error:
        raise InputError(
            f"The package kernels has no {name} for this machine: {error}. Choose another in "
            "speed.attention_kernel, or drop it."
        ) from error
    function = getattr(module, FUNCTION, None)
    if function is None:
        raise InputError(
            f"{name} has no {FUNCTION}, so it does not support packed rows. Choose another in "
            "speed.attention_kernel (kernels-community/flash-attn3@1), or drop it."
        )
    return HubKernel.read(function)
