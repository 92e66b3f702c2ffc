"""Sample groups of completions, with the log-probabilities of the drawn tokens.

    v = argmaxᵥ log p(v) − log Eᵥ,   Eᵥ = −log(1 − h(seed, step, row, completion, position, v))

The Eᵥ are exponential random numbers, so tokens are drawn with probabilities p (Gumbel-max trick).
First a block of tokens is drawn in this way, then a token in it; this needs fewer numbers. `h` is
a counter-based hash. So a token depends only on its row, not on batching, on the number of
processes, or on interruptions. Rounding errors of p change a token only if two tokens are nearly
tied. Sampling by cumulated probabilities is more sensitive: one of 320 tokens changed in a test.
Each prompt is computed once for its group, and the common beginning of all prompts once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ftlevel.data.encoding.collate import pad
from ftlevel.evaluation.decoding import (
    REFILL,
    SHARED,
    RowDecoder,
    Rows,
    get_shared_prefix,
    join,
)
from ftlevel.trained.generation import batches, has_stop_text

PREFILL_TOKENS = 8192
"""Maximum tokens of prompts that are computed together, with padding; a prompt may be longer."""

DRAWN_SCORES = 1 << 19
"""Maximum scores that tokens are drawn from together, unless a row has more."""

_PHI, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def _signed(value: int) -> int:
    """Returns the signed integer with the same 64 bits, because torch has no unsigned ones."""
    return value - 2**64 if value >= 2**63 else value


def advance(state: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns the int64 hash of `state` and `value`, of the same shape."""
    return _mix(state + _signed(_PHI) ^ value)


def _mix(state: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        state ^= (state >> shift) & ((1 << (64 - shift)) - 1)
        if factor != 1:
            state *= _signed(factor)
    return state


@dataclass(frozen=True)
class Noise:
    """Callable that hashes seed, step, row, completion and position to keys of random numbers."""

    seed: int
    step: int

    def __call__(
        self, rows: Sequence[int], completions: Sequence[int], positions: Sequence[int]
    ) -> torch.Tensor:
        """Returns int64 keys `(tokens,)`; the arguments have one value per token to draw."""
        return advance(self.begin(rows, completions), torch.tensor(positions))

    def begin(self, rows: Sequence[int], completions: Sequence[int]) -> torch.Tensor:
        """Returns the int64 hash of each completion, from which `advance` makes keys of tokens."""
        state = torch.full((len(rows),), _signed(self.seed & _MASK))
        for part in ([self.step] * len(rows), rows, completions):
            state = advance(state, torch.tensor(part))
        return state


def exponentials(keys: torch.Tensor, num_values: int, start: int = 0) -> torch.Tensor:
    """Returns exponential random numbers `(n, num_values)` in float32 for `keys` `(n,)`.

    A key defines a sequence of numbers; `start` is the index of the first one to return.
    """
    counters = torch.arange(start + 1, start + num_values + 1, device=keys.device) * _signed(_PHI)
    bits = _mix(keys[:, None] + counters)
    uniform = ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
    return uniform.float().neg_().log1p_().neg_().clamp_(min=torch.finfo(torch.float32).tiny)


@dataclass
class Completion:
    """Sampled token ids, with the log-probability and the entropy of each token in nats.

    Both are at the sampling temperature. `ended` is false for a completion that was truncated.
    """

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of sampling: `count` completions per prompt, up to a stop id or stop text.

    At most `most_rows` completions are sampled together.
    """

    count: int
    temperature: float
    max_new_tokens: int
    stops: Sequence[int]
    stop_texts: Sequence[str] = ()
    most_rows: int = 128


SampledTokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens, their log-probabilities, and the entropies, each `(rows,)`."""


def draw(scores: torch.Tensor, temperature: float, keys: torch.Tensor) -> SampledTokens:
    """Draw a token per row of logits `(rows, vocabulary)`, seeded by `keys` `(rows,)`."""
    vocabulary = scores.shape[1]
    scores = scores.float()
    logps = (scores if temperature == 1 else scores / temperature).log_softmax(-1)
    probabilities = logps.exp()
    size = math.isqrt(vocabulary - 1) + 1
    whole = vocabulary - vocabulary % size
    blocks = probabilities[:, :whole].reshape(len(scores), -1, size).sum(-1)
    if whole < vocabulary:
        blocks = torch.cat([blocks, probabilities[:, whole:].sum(-1, keepdim=True)], dim=1)
    count = blocks.shape[1]
    block = (blocks.log() - exponentials(keys, count).log()).argmax(-1, keepdim=True)
    ids = block * size + torch.arange(size, device=block.device)
    values = probabilities.gather(1, ids.clamp(max=vocabulary - 1))
    values.masked_fill_(ids >= vocabulary, 0)
    drawn = (values.log() - exponentials(keys, size, count).log()).argmax(-1, keepdim=True)
    tokens = ids.gather(1, drawn)[:, 0]
    drawn_logps = logps.gather(1, tokens[:, None])[:, 0]
    entropies = -torch.linalg.vecdot(probabilities, logps.clamp_(min=-1e3))  # 0 · -inf is NaN
    return tokens, drawn_logps, entropies


class _Group:
    """Completions of several prompts while they are sampled, numbered prompt by prompt."""

    def __init__(
        self, rows: Sequence[int], options: SamplingOptions, noise: Noise, tokenizer: Any
    ) -> None:
        self.samples = [Completion() for _ in range(len(rows) * options.count)]
        self._rows, self._options = rows, options
        self._noise, self._tokenizer = noise, tokenizer
        self._stops = frozenset(options.stops)

    def draw(self, numbers: Sequence[int], scores: torch.Tensor) -> list[int]:
        """Append a token drawn from `scores` to each completion in `numbers`; return the tokens."""
        num_generations = self._options.count
        completions = [self.samples[number] for number in numbers]
        keys = self._noise(
            [self._rows[number // num_generations] for number in numbers],
            [number % num_generations for number in numbers],
            [len(completion.ids) for completion in completions],
        ).to(scores.device)
        # With more scores on a CPU, the kernel maps each intermediate tensor anew.
        size = max(1, DRAWN_SCORES // scores.shape[1]) if scores.device.type == "cpu" else len(keys)
        drawn: list[tuple[int, float, float]] = []
        for part, part_keys in zip(torch.split(scores, size), torch.split(keys, size), strict=True):
            sampled = draw(part, self._options.temperature, part_keys)
            drawn += zip(*(values.tolist() for values in sampled), strict=True)
        for completion, (token, logp, entropy) in zip(completions, drawn, strict=True):
            if self.is_over(completion):
                continue
            completion.ids.append(token)
            completion.logps.append(logp)
            completion.entropies.append(entropy)
            completion.ended = token in self._stops or has_stop_text(
                self._tokenizer, completion.ids, self._options.stop_texts
            )
        return [token for token, _, _ in drawn]

    def is_over(self, completion: Completion) -> bool:
        """Whether the completion has ended or has the maximum length."""
        return completion.ended or len(completion.ids) >= self._options.max_new_tokens

    def get_unfinished(self, numbers: Sequence[int]) -> list[int]:
        """Returns the indices in `numbers` of unfinished completions."""
        return [i for i, number in enumerate(numbers) if not self.is_over(self.samples[number])]

    def groups(self) -> list[list[Completion]]:
        num_generations = self._options.count
        return [
            self.samples[at : at + num_generations]
            for at in range(0, len(self.samples), num_generations)
        ]


class GroupSampler(RowDecoder):
    """Sampler with continuous batching; replaces the attention of `model` until `close`."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, (), tokenizer.pad_token_id or 0)
        self._tokenizer = tokenizer

    def _choose_tokens(self, rows: Rows) -> None:
        rows.last = [0] * len(rows.numbers)

    def sample(
        self,
        prompts: Sequence[list[int]],
        rows: Sequence[int],
        options: SamplingOptions,
        noise: Noise,
    ) -> list[list[Completion]]:
        """Returns `options.count` completions per prompt, seeded by `noise` and row indices."""
        group = _Group(rows, options, noise, self._tokenizer)
        pending = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        prefix = get_shared_prefix(prompts)
        is_shared = len(prefix) >= SHARED and len(prompts) > 1
        shared = self.begin([0], [prefix]) if is_shared else None
        current = Rows([], [], [], [])
        size = max(options.most_rows, options.count)
        while True:
            active = group.get_unfinished(current.numbers)
            num_free = size - len(active)
            if pending and (
                not active or (num_free >= options.count and num_free * REFILL >= size)
            ):
                limit = min(num_free // options.count, len(pending))
                num_new = min(limit, max(1, PREFILL_TOKENS // len(prompts[pending[0]])))
                indices = [pending.popleft() for _ in range(num_new)]
                new = self.begin(indices, [prompts[i] for i in indices], shared).fork(options.count)
                new.numbers = [i * options.count + j for i in indices for j in range(options.count)]
                new.last = group.draw(new.numbers, new.scores)
                current = join([(current, active), (new, group.get_unfinished(new.numbers))])
            elif active:
                if (len(current.numbers) - len(active)) * REFILL >= len(current.numbers):
                    current = join([(current, active)])
                self.step(current)
                current.last = group.draw(current.numbers, current.scores)
            else:
                return group.groups()


class _SamplingProcessor(LogitsProcessor):
    """Logits processor that draws the next token itself, and allows `generate` only that one."""

    def __init__(self, group: _Group, numbers: Sequence[int]) -> None:
        self._group, self._numbers = group, numbers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns logits of 0 for the drawn token of each row and -inf for all others."""
        tokens = self._group.draw(self._numbers, scores)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)


class GenerateSampler:
    """Sampler with transformers' `generate`, for models that `GroupSampler` does not support."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def close(self) -> None:
        """Do nothing: the model is not changed."""

    def sample(
        self,
        prompts: Sequence[list[int]],
        rows: Sequence[int],
        options: SamplingOptions,
        noise: Noise,
    ) -> list[list[Completion]]:
        """Returns `options.count` completions per prompt, seeded by `noise` and row indices."""
        group = _Group(rows, options, noise, self._tokenizer)
        pad_id = self._tokenizer.pad_token_id or 0
        device = next(self._model.parameters()).device
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        completions = [i * options.count + at for i in order for at in range(options.count)]
        for numbers in batches(completions, options.most_rows):
            batch = [prompts[number // options.count] for number in numbers]
            self._model.generate(
                input_ids=pad(batch, pad_id, left=True).to(device),
                attention_mask=pad([[1] * len(ids) for ids in batch], 0, left=True).to(device),
                max_new_tokens=options.max_new_tokens,
                use_cache=True,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad_id,
                eos_token_id=list(options.stops) or None,
                logits_processor=LogitsProcessorList([_SamplingProcessor(group, numbers)]),
            )
        return group.groups()
