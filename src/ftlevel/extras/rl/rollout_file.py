"""Read the rollouts.jsonl of a run: one line per sampled prompt, with completions and rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from ftlevel.artifacts.row_sinks import bin_lengths
from ftlevel.artifacts.run_directory import ROLLOUTS, load_jsonl

NUM_BINS = 5
"""Number of length bands in `RolloutStats.lengths`."""


_get_values = itemgetter("text", "reward", "tokens", "ended")


@dataclass(frozen=True)
class CompletionSample:
    """A completion to show in the report; `which` says why, e.g. "best, last step"."""

    which: str
    step: int
    prompt: str
    text: str
    reward: float
    tokens: int
    ended: bool


@dataclass(frozen=True)
class RolloutStats:
    """Best and worst completions of the first and the last step, and the reward by length.

    `lengths` has for each bin of lengths in the last step: minimum and maximum tokens, number of
    completions, and mean reward.
    """

    shown: list[CompletionSample]
    lengths: list[tuple[int, int, int, float]]


def load_rollouts(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a rollouts.jsonl; empty if there is none."""
    return [record for record in load_jsonl(path) if isinstance(record.get("step"), int)]


def summarize_rollouts(run_dir: Path) -> RolloutStats | None:
    """Returns the statistics of a run's rollouts.jsonl; None if it has no scored completions."""
    lines = load_rollouts(run_dir / ROLLOUTS)
    steps = sorted({line["step"] for line in lines})
    if not steps:
        return None
    first_and_last = dict.fromkeys((steps[0], steps[-1]))
    of_steps = [
        [
            CompletionSample(name, step, _text_of(line["prompt"]), *_get_values(completion))
            for line in lines
            if line["step"] == step
            for completion in line["completions"]
            if completion["reward"] is not None
        ]
        for step, name in zip(first_and_last, ("first step", "last step"), strict=False)
    ]
    completions = [
        completion for of_step in of_steps for completion in _select_best_and_worst(of_step)
    ]
    lengths = sorted(((sample.tokens, sample.reward) for sample in of_steps[-1]), key=itemgetter(0))
    return RolloutStats(completions, bin_lengths(lengths, NUM_BINS)) if completions else None


def _select_best_and_worst(completions: Sequence[CompletionSample]) -> list[CompletionSample]:
    if not completions:
        return []
    ordered = sorted(completions, key=lambda completion: completion.reward)
    selected = (("best", ordered[-1]), ("worst", ordered[0]))
    return [replace(shown, which=f"{name}, {shown.which}") for name, shown in selected]


def _text_of(prompt: Any) -> str:
    if isinstance(prompt, list):
        return str(prompt[-1].get("content", "")) if prompt else ""
    return str(prompt)
