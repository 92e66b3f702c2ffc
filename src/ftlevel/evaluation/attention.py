"""Attention of one new token per row, after prompts that several rows share.

    o = (Σₚ aₚ oₚ) / (Σₚ aₚ),   oₚ = Σₜ exp(sₜ − mₚ) vₜ,   aₚ = exp(mₚ − m),   m = max mₚ

The parts p are a row's own tokens and its prompt; s are scores and mₚ their maximum in a part. The
keys of a prompt are read once for all its rows, in one matrix product (as in Hydragen, 2402.05099,
and cascade attention), and stored once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ftlevel.fast.packing import UnsupportedModelError

NAME = "ftlevel_one_token"
"""Name of the attention for `set_attn_implementation`."""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def register() -> None:
    """Register this attention and its mask function with transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class SharedPrompts:
    """Cached prompts, each shared by the rows that begin with it.

    `states` has keys and values per layer, `(prompts, key heads, seq, head_dim)`, of which the last
    `lengths` positions are valid. `prompt_indices` has the index of each row's prompt.
    """

    states: Sequence[tuple[Tensor, Tensor]]
    lengths: Sequence[int]
    prompt_indices: Sequence[int]

    def select(self, rows: Sequence[int]) -> SharedPrompts:
        """Returns the shared prompts for only `rows`, a list of row indices."""
        indices = [self.prompt_indices[row] for row in rows]
        used = sorted(set(indices))
        states, lengths = self.states, self.lengths
        if len(used) < len(lengths):
            lengths = [lengths[prompt] for prompt in used]
            seq = max(lengths)
            index = torch.tensor(used, device=states[0][0].device)
            states = [
                (
                    keys[:, :, -seq:].index_select(0, index),
                    values[:, :, -seq:].index_select(0, index),
                )
                for keys, values in states
            ]
        order = {prompt: at for at, prompt in enumerate(used)}
        return SharedPrompts(states, lengths, [order[owner] for owner in indices])

    @cached_property
    def mask(self) -> Tensor | None:
        """Mask, True at invalid positions, (prompts, 1, 1, seq); None if all are valid."""
        keys = self.states[0][0]
        seq = keys.shape[2]
        if min(self.lengths) == seq:
            return None
        starts = seq - torch.tensor(self.lengths, device=keys.device)
        return (torch.arange(seq, device=keys.device) < starts[:, None])[:, None, None]

    @cached_property
    def width(self) -> int:
        """Maximum number of rows per prompt."""
        return max(self.prompt_indices.count(prompt) for prompt in range(len(self.lengths)))

    @cached_property
    def slots(self) -> Tensor | None:
        """Index of each row in a batch padded to `width` rows per prompt; None if unchanged."""
        num_used = [0] * len(self.lengths)
        slots = []
        for owner in self.prompt_indices:
            slots.append(owner * self.width + num_used[owner])
            num_used[owner] += 1
        if slots == list(range(len(num_used) * self.width)):
            return None
        return torch.tensor(slots, device=self.states[0][0].device)

    def attention_forward(self, query: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `_partial_attention` of `query` (rows, key heads, queries, d) to the prompts."""
        keys, values = self.states[layer]
        prompts, groups, _, width = keys.shape
        if self.slots is not None:
            full = query.new_zeros(prompts * self.width, *query.shape[1:])
            query = full.index_copy_(0, self.slots, query)
        heads = query.shape[2]
        query = query.view(prompts, self.width, groups, heads, width).transpose(1, 2)
        query = query.reshape(prompts, groups, self.width * heads, width)
        return tuple(  # type: ignore[return-value]
            self._to_rows(part, heads)
            for part in _partial_attention(query, keys, values, self.mask)
        )

    def _to_rows(self, part: Tensor, heads: int) -> Tensor:
        prompts, groups, _, size = part.shape
        part = part.view(prompts, groups, self.width, heads, size).transpose(1, 2)
        part = part.reshape(prompts * self.width, groups, heads, size)
        return part if self.slots is None else part.index_select(0, self.slots)


_PROMPTS: ContextVar[Sequence[SharedPrompts]] = ContextVar("shared_prompts", default=())


@contextlib.contextmanager
def using_prompts(prompts: Sequence[SharedPrompts]) -> Iterator[None]:
    """Make forward passes in the `with` block attend to `prompts` and then to their own tokens."""
    token = _PROMPTS.set(prompts)
    try:
        yield
    finally:
        _PROMPTS.reset(token)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of one new token per row; all other calls go to SDPA.

    `query` is `(batch, heads, new, head_dim)`, `key` and `value` are `(batch, key heads, seq,
    head_dim)`; `attention_mask` is `(batch, 1, new, seq)`, True or 0 where visible. `scaling`
    defaults to 1 / sqrt(head_dim). Returns `(batch, new, heads, head_dim)`, and None for the
    attention weights. Raises UnsupportedModelError if the attention cannot have shared prompts.
    """
    rows, heads, new, width = query.shape
    prompts = _PROMPTS.get()
    if new != 1 or dropout or any(kwargs.get(name) is not None for name in _UNSUPPORTED):
        if prompts:
            raise UnsupportedModelError("its attention cannot share prompts")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    scale = width**-0.5 if scaling is None else scaling
    groups = key.shape[1]
    query = (query * scale).view(rows, groups, heads // groups, width)
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    if prompts:
        attn_output = _attention_with_prompts(prompts, module, query, key, value, mask)
    else:
        scores = torch.matmul(query, key.transpose(2, 3))
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        attn_weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        attn_output = torch.matmul(attn_weights, value)
    return attn_output.reshape(rows, 1, heads, value.shape[-1]), None


def _attention_with_prompts(
    prompts: Sequence[SharedPrompts],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Returns attention over shared prompts and own tokens, `(rows, key heads, queries, d)`."""
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedModelError("its attention does not know its layer")
    if mask is not None and mask.dtype != torch.bool:
        raise UnsupportedModelError("its attention adds a bias to scores")
    row_output = _partial_attention(query, key, value, None if mask is None else ~mask)
    first = 0
    outputs = []
    for block in prompts:
        outputs.append(
            block.attention_forward(query[first : first + len(block.prompt_indices)], layer)
        )
        first += len(block.prompt_indices)
    shared = [
        torch.cat(each) if len(prompts) > 1 else each[0] for each in zip(*outputs, strict=True)
    ]
    max_scores = torch.maximum(row_output[1], shared[1])
    factors = [(part[1] - max_scores).exp_() for part in (row_output, shared)]
    total = factors[0] * row_output[2] + factors[1] * shared[2]
    attn_output = factors[0] * row_output[0] + factors[1] * shared[0]
    return attn_output.div_(total).to(value.dtype)


def _partial_attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (Σ wₜ vₜ, m, Σ wₜ), wₜ = exp(sₜ − m), m = max sₜ, for tokens not in mask `hidden`."""
    scores = torch.matmul(query, key.transpose(2, 3))
    if hidden is not None:
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    scores = scores.float()
    max_scores = scores.amax(-1, keepdim=True)
    weights = scores.sub_(max_scores).exp_()
    return (
        torch.matmul(weights.to(value.dtype), value).float(),
        max_scores,
        weights.sum(-1, keepdim=True),
    )
