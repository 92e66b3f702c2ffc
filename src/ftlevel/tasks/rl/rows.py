"""Rows of sampled completions, and the stand-ins with which a run is checked before it samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ftlevel.data.encoding.encode import IGNORED, Encoded

Signal = tuple[float, float, float, float, float]
"""Advantage, weight, and three log-probabilities: old, of the reference, and of the sampler.

NaN where it is unknown: `old` then equals that of the policy, and there is no penalty. In
on-policy distillation the reference is the teacher, and the advantage is not used.
"""

UNKNOWN = math.nan


@dataclass(frozen=True)
class CompletionRow(Encoded):
    """A prompt of `prompt` tokens with a sampled completion; `values` has a signal per token.

    `number` is the index of the completion in its group.
    """

    prompt: int = 0
    number: int = 0
    values: tuple[Signal, ...] = ()

    @property
    def signals(self) -> Sequence[Signal]:
        """The signals of the completion's tokens."""
        return self.values

    @property
    def completion(self) -> list[int]:
        """Token ids of the completion."""
        return self.input_ids[self.prompt :]


TokenLogps = Callable[[Sequence[CompletionRow]], list[list[float]]]
"""Rows → log-probabilities of their completions' tokens."""


def build_completion_row(
    prompt: list[int], completion: list[int], row: int, number: int, values: Sequence[Signal]
) -> CompletionRow:
    """Build the row of a prompt and a completion, with a signal for each of its tokens."""
    labels = [IGNORED] * len(prompt) + completion
    return CompletionRow(prompt + completion, labels, row, {}, len(prompt), number, tuple(values))


STAND_INS = 2
STAND_IN_TOKENS = 8


def stand_in_completions(
    prompt: list[int], row: int, count: int = STAND_INS, tokens: int = STAND_IN_TOKENS
) -> Iterator[CompletionRow]:
    """Yield made-up completions of `prompt` with opposite advantages."""
    for number in range(count):
        ids = [prompt[(7 * at + 3 * number) % len(prompt)] for at in range(tokens)]
        signal = (1.0 - 2 * (number % 2), 1 / tokens, UNKNOWN, UNKNOWN, UNKNOWN)
        yield build_completion_row(prompt, ids, row, number, [signal] * len(ids))
