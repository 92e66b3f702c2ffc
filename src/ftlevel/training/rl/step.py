"""The rollout of an optimizer step: groups of all processes, advantages, and rows to train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ftlevel.config.rl import RlConfig
from ftlevel.evaluation.rollouts import Group
from ftlevel.tasks.rl.losses import (
    completion_weights,
    compute_advantages,
    has_spread,
    penalize_rewards,
)
from ftlevel.tasks.rl.objective import loss_parameters
from ftlevel.tasks.rl.rows import UNKNOWN, CompletionRow, build_completion_row

TokenLogps = Callable[[Sequence[CompletionRow]], list[list[float]]]
"""Rows → log-probabilities of their completions' tokens."""


@dataclass(frozen=True)
class GroupFacts:
    """What all processes know of a group: values per completion.

    `lengths` are tokens, `active` those with a loss, `scores` are (completions, functions).
    `entropy` is the sum over all tokens of the group.
    """

    row: int
    rewards: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray
    active: np.ndarray
    ended: np.ndarray
    entropy: float


def describe_group(group: Group, settings: RlConfig) -> GroupFacts:
    """Return the facts of `group`."""
    lengths = np.array([len(completion.ids) for completion in group.completions])
    ended = np.array([completion.ended for completion in group.completions])
    active = np.where(ended, lengths, 0) if settings.mask_truncated_completions else lengths
    entropy = sum(sum(completion.entropies) for completion in group.completions)
    return GroupFacts(group.row.row, group.rewards, group.scores, lengths, active, ended, entropy)


@dataclass
class Rollout:
    """Rows of this process to train on, and metrics of the groups of all processes.

    `groups` are those of this process, with the ones that were replaced.
    """

    rows: list[CompletionRow]
    groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)


def weigh(
    groups: Sequence[Group],
    everyone: Sequence[GroupFacts],
    settings: RlConfig,
    old: TokenLogps | None,
    reference: TokenLogps | None,
    exchange: Callable[[Any], list[Any]],
) -> list[CompletionRow]:
    """Return the completions of `groups` to train on, with advantages and weights.

    Completions without an advantage are left out if there is no KL penalty. `everyone` has the
    groups of all processes that count. `old` and `reference` compute log-probabilities where the
    loss needs them.
    """
    own = [rows_of(group) for group in groups]
    flat = [row for rows in own for row in rows]
    old_logps = old(flat) if old is not None else [[UNKNOWN] * len(r.completion) for r in flat]
    known = reference(flat) if reference is not None else None
    by_row = {facts.row: facts for facts in sorted(everyone, key=lambda facts: facts.row)}
    order = {row: at for at, row in enumerate(by_row)}
    rewards = torch.from_numpy(np.stack([facts.rewards for facts in by_row.values()]))
    active = torch.from_numpy(np.stack([facts.active for facts in by_row.values()]))
    if known is not None and settings.loss == "rloo":
        shares = {
            (row.row, row.number): sum(a) - sum(b)
            for row, a, b in zip(flat, old_logps, known, strict=True)
        }
        apart = {key: value for part in exchange(shares) for key, value in part.items()}
        ratios = torch.zeros_like(rewards)
        for (row, number), value in apart.items():
            ratios[order[row], number] = value
        rewards = penalize_rewards(rewards, ratios, torch.zeros_like(ratios), settings.beta)
    advantages = compute_advantages(rewards, active, settings.loss, settings.scale)
    weights = completion_weights(active.flatten(), loss_parameters(settings)).view_as(active)
    chosen: list[CompletionRow] = []
    for at, row in enumerate(flat):
        place = order[row.row], row.number
        advantage, weight = float(advantages[place]), float(weights[place])
        if not int(active[place]) or (not advantage and not settings.beta):
            continue
        before, sampled = old_logps[at], [signal[4] for signal in row.values]
        other = known[at] if known is not None else [UNKNOWN] * len(before)
        values = [(advantage, weight, *logps) for logps in zip(before, other, sampled, strict=True)]
        chosen.append(
            build_completion_row(
                row.input_ids[: row.prompt], row.completion, row.row, row.number, values
            )
        )
    return chosen


def rows_of(group: Group) -> list[CompletionRow]:
    """Return the completions of a group as rows that know the sampler's log-probabilities."""
    return [
        build_completion_row(
            group.row.input_ids,
            completion.ids,
            group.row.row,
            number,
            [(0.0, 0.0, UNKNOWN, UNKNOWN, logp) for logp in completion.logps],
        )
        for number, completion in enumerate(group.completions)
    ]


def has_signal(facts: GroupFacts) -> bool:
    """Whether the rewards of a group differ."""
    return bool(has_spread(torch.from_numpy(facts.rewards)[None])[0])


def measure(everyone: Sequence[GroupFacts], names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of all sampled groups, for the log."""
    ordered = sorted(everyone, key=lambda facts: facts.row)
    rewards = np.stack([facts.rewards for facts in ordered])
    scores = np.concatenate([facts.scores for facts in ordered])
    lengths = np.concatenate([facts.lengths for facts in ordered])
    ended = np.concatenate([facts.ended for facts in ordered])
    found: dict[str, float] = {"reward": _mean(rewards), "reward_std": _spread(rewards)}
    if len(names) > 1:
        found |= {f"reward_{name}": _mean(scores[:, at]) for at, name in enumerate(names)}
    spread = has_spread(torch.from_numpy(rewards)).numpy()
    found["groups_with_signal"] = float(spread.mean())
    found["completion_length"] = float(lengths.mean())
    found["truncated"] = float(1 - ended.mean())
    found["entropy"] = float(sum(facts.entropy for facts in ordered) / lengths.sum())
    found["completion_tokens"] = float(lengths.sum())
    return {name: value for name, value in found.items() if not np.isnan(value)}


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _spread(rewards: np.ndarray) -> float:
    """Return the mean standard deviation within groups, (groups, completions)."""
    known = [row[~np.isnan(row)] for row in rewards]
    stds = [row.std(ddof=1) for row in known if len(row) > 1]
    return float(np.mean(stds)) if stds else float("nan")


def bound_of(dtype: str, quantization: str) -> float:
    """Return the mean difference of log-probabilities that rounding explains, in nats."""
    return COARSE if quantization == "8bit" else ROUNDING.get(dtype, COARSE)


ROUNDING = {"float32": 2e-4}
"""Largest mean |Δℓ| between sampler and trainer by rounding: 4e-6 in float32 with 64 tokens."""

COARSE = 0.15
"""The same in half precision and 8 bits: 0.044 in bfloat16."""
