"""Attention of one new token per row, after prompts that several rows share.

    o = Σₚ softmax([s₁, s₂])ₚ vₚ

The parts p are a row's prompt and its own tokens, with scores s. The keys of a prompt are read once
for all its rows, in one matrix product (as in Hydragen, 2402.05099, and cascade attention), and
stored once.
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
        """Mask, True at invalid positions, (prompts, 1, seq); None if all are valid."""
        keys = self.states[0][0]
        seq = keys.shape[2]
        if min(self.lengths) == seq:
            return None
        starts = seq - torch.tensor(self.lengths, device=keys.device)
        return (torch.arange(seq, device=keys.device) < starts[:, None])[:, None]

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

    def get_scores(self, query: Tensor, layer: int) -> Tensor:
        """Returns scores (key heads, rows, queries, seq); `query` has d instead of seq."""
        keys = self.states[layer][0].transpose(0, 1)
        scores = _multiply(self._to_prompts(query), keys.transpose(2, 3))
        if self.mask is not None:
            scores.masked_fill_(self.mask, torch.finfo(scores.dtype).min)
        return self._to_rows(scores)

    def get_values(self, weights: Tensor, layer: int) -> Tensor:
        """Returns the sums of values, shaped like a query; `weights` is shaped like scores."""
        values = self.states[layer][1].transpose(0, 1)
        return self._to_rows(_multiply(self._to_prompts(weights), values))

    def _to_prompts(self, part: Tensor) -> Tensor:
        """Returns (key heads, rows, queries, n) as (key heads, prompts, width · queries, n)."""
        if self.slots is not None:
            groups, _, *shape = part.shape
            full = part.new_zeros(groups, len(self.lengths) * self.width, *shape)
            part = full.index_copy_(1, self.slots, part)
        return part.reshape(len(part), len(self.lengths), -1, part.shape[-1])

    def _to_rows(self, part: Tensor) -> Tensor:
        groups, prompts, queries, size = part.shape
        part = part.view(groups, prompts * self.width, queries // self.width, size)
        return part if self.slots is None else part.index_select(1, self.slots)


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
    layer = getattr(module, "layer_idx", None)
    if mask is not None and mask.dtype == torch.bool:
        mask = ~mask
    elif prompts and mask is not None:
        raise UnsupportedModelError("its attention adds a bias to scores")
    if prompts and layer is None:
        raise UnsupportedModelError("its attention does not know its layer")
    attn_output = attend(query, key, value, mask, layer, prompts)
    return attn_output.reshape(rows, 1, heads, value.shape[-1]), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    layer: Any,
    prompts: Sequence[SharedPrompts],
) -> Tensor:
    """Returns attention to shared prompts and own tokens, `(rows, key heads, queries, d)`.

    `query` has that shape and is scaled; `key` and `value` are `(rows, key heads, seq, d)`; `mask`
    is `(rows, 1, 1, seq)`, True at tokens to ignore, or a bias for scores without prompts.
    """
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    if query.dtype == torch.float32:
        scores = _multiply(query, key.transpose(2, 3))
    else:  # oneDNN takes half as long in this order
        scores = _multiply(key, query.transpose(2, 3)).transpose(2, 3)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(mask.transpose(0, 1), torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask.transpose(0, 1)
    if not prompts:
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        return _sum_values(weights, value).transpose(0, 1)
    outputs, first = [], 0
    for block in prompts:
        rows = slice(first, first + len(block.prompt_indices))
        prompt_scores = block.get_scores(query[:, rows], layer)
        both = torch.cat([prompt_scores, scores[:, rows]], -1).softmax(-1, dtype=torch.float32)
        parts = torch.split(both.to(value.dtype), [prompt_scores.shape[-1], scores.shape[-1]], -1)
        output = block.get_values(parts[0], layer)
        outputs.append(output.add_(_sum_values(parts[1], value[:, rows])))
        first = rows.stop
    return (torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]).transpose(0, 1)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Returns `left @ right`, both (heads, rows, …); `matmul` needs more calls for this."""
    product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
    return product.view(*left.shape[:2], *product.shape[1:])


def _sum_values(weights: Tensor, value: Tensor) -> Tensor:
    """Returns `weights @ value`; if `value` is stored by column, in the order that is fast then."""
    if value.stride(-1) == 1:
        return _multiply(weights, value)
    return _multiply(value.transpose(2, 3), weights.transpose(2, 3)).transpose(2, 3)
