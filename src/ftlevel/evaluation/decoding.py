"""Greedy decoding with continuous batching: a finished row is replaced by the next prompt.

    step      1 2 3 4 5 6
    row 1     a a a c c c     c starts after a has ended; rows are padded on the left, and
    row 2     b b b b b b     position ids count from the start of each row

transformers' `generate` runs a batch until the last row ends, and copies the KV cache at every
token. Here the cache is allocated ahead, and a prefix that all prompts share is computed once.
`get_decoder_error` checks on the model that the logits do not change.

SDPA with a mask repeats grouped keys and values; `evaluation.attention` computes the attention of
one new token per row without these copies.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ftlevel.data.encoding.collate import pad
from ftlevel.errors import join_names
from ftlevel.evaluation.attention import NAME, SharedPrompts, register, using_prompts
from ftlevel.evaluation.decoding_step import create_decoding_step
from ftlevel.evaluation.packed_weights import PackedWeights
from ftlevel.fast import packed_attention as packed
from ftlevel.fast.likelihoods import base_model
from ftlevel.fast.plan import get_packing_message, has_virtual_tokens
from ftlevel.models.kinds import max_positions
from ftlevel.models.upstream.architectures import attention_of
from ftlevel.trained.generation import has_stop_text, stop_ids
from ftlevel.trained.model_ref import LoadedModel

CACHE_GROWTH = 64
"""Number of positions by which the KV cache grows."""

REFILL = 4
"""New prompts start once 1 / REFILL of the batch is free, because starting costs a forward pass."""

SHARED = 16
"""Minimum length in tokens of a common prefix that is computed once."""

_PROMPT = 12
"""Length in tokens of the prompt that a model is checked with."""

_IGNORED_KEYS = set(
    """
    bos_token_id eos_token_id pad_token_id transformers_version do_sample temperature top_p
    top_k min_p typical_p max_length max_new_tokens use_cache _from_model_config
    trust_remote_code cache_implementation
    """.split()
)
"""Settings of generation_config that do not affect greedy decoding."""


_DISABLED_VALUES = (None, False, 0, 1)
"""Values that disable a setting of generation_config: a penalty of 1, an n-gram size of 0."""


class RowDecoder:
    """Greedy decoder that replaces attention and linear layers of `model` until `close`."""

    def __init__(
        self,
        model: Any,
        stop_token_ids: Sequence[int],
        pad_id: int,
        has_stop_text: Callable[[Sequence[int]], bool] = lambda _: False,
    ) -> None:
        self._model, self._base = model, base_model(model)
        self._stop_token_ids, self._pad_id = frozenset(stop_token_ids), pad_id
        self._has_stop_text = has_stop_text
        self._device = next(model.parameters()).device
        self._last_position = (max_positions(self._base.config) or 2**31) - 1
        # transformers 5.24 renames the argument, one model type at a time.
        parameters = inspect.signature(self._base.forward).parameters
        self._cache = "cache" if "cache" in parameters else "past_key_values"
        self._attention_before = attention_of(self._base)
        self.packed = PackedWeights(model)
        self._step = create_decoding_step(self._base, self.packed)
        register()
        self._base.set_attn_implementation(NAME)

    def close(self) -> None:
        """Restore the model's attention and linear layers."""
        self.packed.close()
        self._base.set_attn_implementation(self._attention_before)

    def __call__(
        self, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int
    ) -> list[list[int]]:
        """Returns the generated ids of each prompt; `max_new_tokens` includes the stop id."""
        outputs = _Outputs(len(prompts), max_new_tokens, self._has_ended)
        pending = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        prefix = get_shared_prefix(prompts)
        is_shared = len(prefix) >= SHARED and len(prompts) > 1
        shared = self.begin([0], [prefix]) if is_shared else None
        rows = Rows([], [], [], [])
        while True:
            active = outputs.get_unfinished(rows)
            num_free = batch_size - len(active)
            if pending and (not active or num_free * REFILL >= batch_size):
                chosen = [pending.popleft() for _ in range(min(num_free, len(pending)))]
                new = self.begin(chosen, [prompts[i] for i in chosen], shared)
                outputs.append(new)
                rows = join([(rows, active), (new, outputs.get_unfinished(new))])
            elif active:
                if (len(rows.numbers) - len(active)) * REFILL >= len(rows.numbers):
                    rows = join([(rows, active)])
                self.step(rows)
                outputs.append(rows)
            else:
                return outputs.ids_per_prompt

    def _has_ended(self, ids: Sequence[int]) -> bool:
        return ids[-1] in self._stop_token_ids or self._has_stop_text(ids)

    def begin(
        self, numbers: Sequence[int], prompts: Sequence[list[int]], shared: Rows | None = None
    ) -> Rows:
        """Prefill `prompts` and return their rows, with the first new token of each.

        `numbers` are the indices of the prompts. `shared` has one row, the KV cache of a common
        prefix, which every prompt must extend by at least one token.
        """
        prefix_length = shared.lengths[0] if shared else 0
        new_ids = [ids[prefix_length:] for ids in prompts]
        new = max(len(ids) for ids in new_ids)
        num_layers = self._base.config.get_text_config().num_hidden_layers
        layers = [_BufferedLayer() for _ in range(num_layers)]
        if shared:
            for layer, shared_layer in zip(layers, shared.layers, strict=True):
                layer.repeat(shared_layer, len(new_ids), prefix_length + new)
        rows = Rows(list(numbers), [len(ids) for ids in prompts], [], layers)
        ids = pad(new_ids, self._pad_id, left=True).to(self._device)
        self._forward(rows, ids, prefix_length + new, prefix_length)
        if shared:
            for layer, shared_layer in zip(layers, shared.layers, strict=True):
                layer.shift_prefix(shared_layer, [new - len(ids) for ids in new_ids])
        return rows

    def step(self, rows: Rows) -> None:
        """Generate one more token in each of `rows` (modified)."""
        rows.lengths = [length + 1 for length in rows.lengths]
        ids = torch.tensor(rows.last, device=self._device)[:, None]
        self._forward(rows, ids, rows.layers[0].get_seq_length() + 1)

    def _forward(self, rows: Rows, ids: torch.Tensor, seq: int, shared: int = 0) -> None:
        """Run the model on `ids` (rows, new), which extends the cache to `seq` positions.

        The logits of the last position are stored in `rows.scores`.
        The first `shared` positions are a prefix that all rows share.
        """
        starts = seq + shared - torch.tensor(rows.lengths, device=self._device)[:, None]
        positions = torch.arange(seq, device=self._device)[None]
        row_positions = (positions - starts + shared).clamp(min=0)[:, -ids.shape[1] :]
        offsets = [block.lengths[at] for block in rows.prompts for at in block.prompt_indices]
        if offsets:
            row_positions = row_positions + torch.tensor(offsets, device=self._device)[:, None]
        # Rows that have ended stay for a while, and their outputs are ignored.
        row_positions = row_positions.clamp(max=self._last_position)
        mask = (positions >= starts) | (positions < shared)
        if self._step is not None and ids.shape[1] == 1 and self._step.supports(len(ids)):
            hidden = None if min(rows.lengths) == seq else ~mask[:, None, None]
            rows.scores = self._step(ids, row_positions, hidden, rows.layers, rows.prompts)
        else:
            with using_prompts(rows.prompts):
                outputs = self._model(
                    input_ids=ids,
                    attention_mask=mask.long(),
                    position_ids=row_positions,
                    use_cache=True,
                    logits_to_keep=1,
                    **{self._cache: Cache(layers=rows.layers)},
                )
            rows.scores = outputs.logits[:, -1]
        self._choose_tokens(rows)

    def _choose_tokens(self, rows: Rows) -> None:
        rows.last = rows.scores.argmax(-1).tolist()


@dataclass
class Rows:
    """Batch of rows that are generated together.

    `numbers` are prompt indices, `lengths` the cached tokens per row (aligned on the right), `last`
    the next token of each row, and `scores` its logits `(rows, vocabulary)`. `prompts` are the
    prompts that rows share; either all rows have one or none has.
    """

    numbers: list[int]
    lengths: list[int]
    last: list[int]
    layers: Sequence[_BufferedLayer]
    scores: Any = None
    prompts: Sequence[SharedPrompts] = ()

    def fork(self, num_copies: int) -> Rows:
        """Returns `num_copies` copies of each row; the cached tokens become a shared prompt."""
        index = [i for i in range(len(self.numbers)) for _ in range(num_copies)]
        states = [(layer.keys, layer.values) for layer in self.layers]
        return Rows(
            [self.numbers[i] for i in index],
            [0] * len(index),
            [self.last[i] for i in index],
            [_BufferedLayer() for _ in self.layers],
            self.scores.index_select(0, torch.tensor(index, device=self.scores.device)),
            (SharedPrompts(states, self.lengths, index),),
        )


class _Outputs:
    """Generated ids of each prompt, until `has_ended(ids)` or up to `max_new_tokens`."""

    def __init__(
        self, num_prompts: int, max_new_tokens: int, has_ended: Callable[[Sequence[int]], bool]
    ) -> None:
        self.ids_per_prompt: list[list[int]] = [[] for _ in range(num_prompts)]
        self._finished: set[int] = set()
        self._max_new_tokens, self._has_ended = max_new_tokens, has_ended

    def append(self, rows: Rows) -> None:
        """Append the next token of each unfinished row to the ids of its prompt."""
        for number, token in zip(rows.numbers, rows.last, strict=True):
            if number in self._finished:
                continue
            ids = self.ids_per_prompt[number]
            ids.append(token)
            if len(ids) >= self._max_new_tokens or self._has_ended(ids):
                self._finished.add(number)

    def get_unfinished(self, rows: Rows) -> list[int]:
        """Returns the indices in `rows` of the rows that are not finished."""
        return [i for i, number in enumerate(rows.numbers) if number not in self._finished]


class _BufferedLayer(DynamicLayer):
    """Cache layer with unused positions at its end, so that appending a token rarely copies it."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def fill(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Store `keys` and `values` (rows, heads, positions, head_dim), valid up to `length`."""
        self._buffers = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def repeat(self, layer: _BufferedLayer, rows: int, length: int) -> None:
        """Copy the only row of `layer` `rows` times, with space for `length` positions in each."""
        prefix_length = layer.get_seq_length()
        buffers = _allocate(layer, rows, length)
        for buffer, states in zip(buffers, (layer.keys, layer.values), strict=True):
            buffer[:, :, :prefix_length] = states
        self.fill(*buffers, prefix_length)

    def shift_prefix(self, layer: _BufferedLayer, offsets: Sequence[int]) -> None:
        """Copy `layer`, the shared prefix, into each row, shifted right by the row's offset."""
        prefix_length = layer.get_seq_length()
        for row, gap in enumerate(offsets):
            if gap:
                self.keys[row, :, gap : gap + prefix_length] = layer.keys[0]
                self.values[row, :, gap : gap + prefix_length] = layer.values[0]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002 - the signature is transformers'
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new tokens, and return those of all tokens."""
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self._buffers is None or after > self._buffers[0].shape[-2]:
            old = self.keys, self.values
            self.keys, self.values = key_states, value_states
            self._buffers = _allocate(self, len(key_states), after)
            if before:
                self._buffers[0][:, :, :before], self._buffers[1][:, :, :before] = old
        self._buffers[0][:, :, before:after] = key_states
        self._buffers[1][:, :, before:after] = value_states
        self.fill(*self._buffers, after)
        if after - before == 1:
            return self.keys, self.values
        return self.keys, self.values.contiguous()  # for SDPA


def _allocate(layer: _BufferedLayer, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns zeros like keys and values of `layer`, for `rows` and more than `length` positions.

    They are stored by head for `attend`; float32 values on a CPU by column, which is fast in MKL.
    """
    keys, values = layer.keys, layer.values
    shape = keys.shape[1], rows, length + CACHE_GROWTH
    keys = keys.new_zeros(*shape, keys.shape[3]).transpose(0, 1)
    if values.dtype == torch.float32 and values.device.type == "cpu":
        values = values.new_zeros(*shape[:2], values.shape[3], shape[2]).transpose(2, 3)
    else:
        values = values.new_zeros(*shape, values.shape[3])
    return keys, values.transpose(0, 1)


def get_shared_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """Returns the longest common prefix of `prompts` that is shorter than each of them."""
    if not prompts:
        return []
    first, last = min(prompts), max(prompts)
    pairs = enumerate(zip(first, last, strict=False))
    length = next((at for at, (one, other) in pairs if one != other), len(first))
    return first[: min(length, min(map(len, prompts)) - 1)]


def join(batches: Sequence[tuple[Rows, Sequence[int]]]) -> Rows:
    """Concatenate batches, each given with the ascending indices of the rows to keep."""
    batches = [(rows, chosen) for rows, chosen in batches if chosen]
    if not batches:
        return Rows([], [], [], [])
    lengths = [rows.lengths[i] for rows, chosen in batches for i in chosen]
    seq = max(lengths)
    layers: list[_BufferedLayer] = []
    for at in range(len(batches[0][0].layers)):
        layers.append(_BufferedLayer())
        if not seq:
            continue
        first = next(rows.layers[at] for rows, _ in batches if rows.layers[at].keys is not None)
        buffers = _allocate(first, len(lengths), seq)
        for name, buffer in zip(("keys", "values"), buffers, strict=True):
            states = [getattr(rows.layers[at], name) for rows, _ in batches]
            start = 0
            for part, (rows, chosen) in zip(states, batches, strict=True):
                width = max(rows.lengths[i] for i in chosen)
                if width:
                    index = torch.tensor(chosen, device=part.device)
                    target = buffer[start : start + len(chosen), :, seq - width : seq]
                    target.copy_(part[:, :, part.shape[2] - width :].index_select(0, index))
                start += len(chosen)
        layers[-1].fill(*buffers, seq)
    return Rows(
        [rows.numbers[i] for rows, chosen in batches for i in chosen],
        lengths,
        [rows.last[i] for rows, chosen in batches for i in chosen],
        layers,
        prompts=[block for rows, chosen in batches for block in _select_prompts(rows, chosen)],
    )


def _select_prompts(rows: Rows, chosen: Sequence[int]) -> Iterator[SharedPrompts]:
    first = 0
    for block in rows.prompts:
        indices = [i - first for i in chosen if first <= i < first + len(block.prompt_indices)]
        first += len(block.prompt_indices)
        if indices:
            yield block.select(indices)


def open_decoder(trained: LoadedModel, prompts: Sequence[list[int]]) -> RowDecoder | Literal[False]:
    """Returns a decoder whose logits match the model's; False if `generate` must be used."""
    model, tokenizer = trained.model, trained.tokenizer
    if get_decoder_limitation(model, trained.kind, trained.ref.card.method):
        return False
    has_ended = partial(has_stop_text, tokenizer, stop_texts=trained.task.stop_texts)
    decoder = RowDecoder(model, stop_ids(model, tokenizer), tokenizer.pad_token_id or 0, has_ended)
    if get_decoder_error(decoder, model, max(prompts, key=len), max_error(trained.dtype)):
        decoder.close()
        return False
    return decoder


def get_decoder_limitation(model: Any, kind: str, method: str) -> str:
    """Returns why `RowDecoder` cannot replace `generate` for `model`; "" if it can."""
    if reason := get_cache_limitation(model, kind, method):
        return reason
    options = base_model(model).generation_config.to_diff_dict()
    ignored_options = {
        name for name, value in options.items() if value not in _DISABLED_VALUES
    } - _IGNORED_KEYS
    return (
        f"its generation_config has {join_names(sorted(ignored_options))}"
        if ignored_options
        else ""
    )


def get_cache_limitation(model: Any, kind: str, method: str) -> str:
    """Returns why `RowDecoder` cannot compute the logits of `model`; "" if it can."""
    if reason := get_attention_limitation(model, kind, method):
        return reason
    layers = DynamicCache(config=base_model(model).config).layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        return "it keeps a window of its rows only"
    return ""


def get_attention_limitation(model: Any, kind: str, method: str) -> str:
    """Returns why the attention of `model` cannot be replaced while it generates; "" if it can."""
    base = base_model(model)
    is_packed = attention_of(base) == packed.NAME
    if not is_packed and (reason := get_packing_message(base, kind)):
        return reason
    if has_virtual_tokens(model, method):
        return "its adapter puts virtual tokens into every row"
    return ""


def max_error(dtype: str) -> float:
    """Returns the error of logits that `dtype` explains, relative to their standard deviation.

    With SmolLM2-135M in bfloat16, it is at most 0.034; with a wrong position, at least 0.098.
    """
    return 1e-4 if dtype == "float32" else 6e-2


def get_decoder_error(
    decoder: RowDecoder, model: Any, prompt: Sequence[int], noise: float, *, forks: bool = False
) -> str:
    """Returns why `decoder` computes wrong logits with `model`; "" if they are right.

    The check decodes a row with a shared prefix next to a longer row, separates the two, and joins
    the first with a third. Its logits must match an ordinary forward pass up to `noise` and to a
    constant, which bfloat16 rounds most and which probabilities do not depend on. With `forks`,
    rows are also duplicated. Call it in eval mode under `torch.no_grad`.
    """
    long = [*prompt, *prompt][:_PROMPT]
    short = long[: _PROMPT // 2]
    try:
        rows = decoder.begin([0, 1], [long, short], decoder.begin([0], [short[:-2]]))
        token = rows.scores[1].argmax().item()
        third = decoder.begin([2], [long[1:]])
        if forks:
            rows, third = rows.fork(2), third.fork(2)
            rows.last = [token] * 4
            rows = join([(third, [1]), (rows, [0, 2, 3])])
            decoder.step(rows)
            rows.last = [token] * 4
            rows = join([(rows, [0, 2, 3])])
        else:
            rows = join([(third, [0]), (rows, [1])])
        decoder.step(rows)
        ids = torch.tensor(
            [[*short, token, *([token] if forks else [])]], device=rows.scores.device
        )
        with decoder.packed.disabled():
            expected = model(input_ids=ids).logits[0, -1].float()
    except (TypeError, NotImplementedError) as error:
        return str(error)
    difference = rows.scores[-1].float() - expected
    if not difference.std() < noise * expected.std():
        return "rows that come and go give other scores than rows alone"
    return ""
