"""rollouts.jsonl of a run: one line per sampled prompt, with its completions and their rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ftlevel.artifacts.run_directory import read_objects

BANDS = 5
"""Number of length bands in `RolloutFacts.lengths`."""


@dataclass(frozen=True)
class ShownCompletion:
    """A completion for the report; `which` says why it is printed."""

    which: str
    step: int
    prompt: str
    text: str
    reward: float
    tokens: int
    ended: bool


@dataclass(frozen=True)
class RolloutFacts:
    """Completions of the first and the last step, best and worst, and reward by length.

    `lengths` are minimum and maximum tokens, completions, and their mean reward, in the last step.
    """

    shown: list[ShownCompletion]
    lengths: list[tuple[int, int, int, float]]


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a rollouts.jsonl; empty if there is none."""
    return [record for record in read_objects(path) if isinstance(record.get("step"), int)]


def summarize_rollouts(path: Path) -> RolloutFacts | None:
    """Returns the facts of a rollouts.jsonl for the report; None without scored completions."""
    lines = read_rollouts(path)
    steps = sorted({line["step"] for line in lines})
    if not steps:
        return None
    ends = dict.fromkeys((steps[0], steps[-1]))
    of_steps = [
        _completions(lines, step, name)
        for step, name in zip(ends, ("first step", "last step"), strict=False)
    ]
    completions = [completion for of_step in of_steps for completion in _ends(of_step)]
    return RolloutFacts(completions, _by_length(of_steps[-1])) if completions else None


def _completions(lines: Sequence[Mapping[str, Any]], step: int, name: str) -> list[ShownCompletion]:
    """Returns the scored completions of a step."""
    return [
        ShownCompletion(
            name,
            step,
            _text_of(line["prompt"]),
            completion["text"],
            completion["reward"],
            completion["tokens"],
            completion["ended"],
        )
        for line in lines
        if line["step"] == step
        for completion in line["completions"]
        if completion["reward"] is not None
    ]


def _ends(completions: Sequence[ShownCompletion]) -> list[ShownCompletion]:
    """Returns the best and the worst completion, with that in `which`."""
    if not completions:
        return []
    ordered = sorted(completions, key=lambda completion: completion.reward)
    ends = (("best", ordered[-1]), ("worst", ordered[0]))
    return [replace(shown, which=f"{name}, {shown.which}") for name, shown in ends]


def _by_length(completions: Sequence[ShownCompletion]) -> list[tuple[int, int, int, float]]:
    ordered = sorted(completions, key=lambda completion: completion.tokens)
    if len({completion.tokens for completion in ordered}) < BANDS:
        return []
    bands = [
        ordered[len(ordered) * at // BANDS : len(ordered) * (at + 1) // BANDS]
        for at in range(BANDS)
    ]
    return [
        (band[0].tokens, band[-1].tokens, len(band), fmean(c.reward for c in band))
        for band in bands
    ]


def _text_of(prompt: Any) -> str:
    """Returns the prompt as text: the last message, if it is a list of messages."""
    if isinstance(prompt, list):
        return str(prompt[-1].get("content", "")) if prompt else ""
    return str(prompt)
