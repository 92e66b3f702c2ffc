"""Rollouts of an optimizer step: groups of all processes, rows to train on, rollouts.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftlevel.artifacts.files import write_text
from ftlevel.extras.rl.config import RlConfig
from ftlevel.extras.rl.losses import (
    completion_weights,
    compute_advantages,
    has_spread,
    penalize_rewards,
)
from ftlevel.extras.rl.objective import loss_parameters
from ftlevel.extras.rl.rollout_file import load_rollouts
from ftlevel.extras.rl.rollouts import Group
from ftlevel.extras.rl.rows import UNKNOWN, CompletionRow, TokenLogps
from ftlevel.safe_io import open_existing
from ftlevel.training.processes import Processes


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of a group, the completions of one prompt; exchanged between processes.

    Attributes:
        scores: of shape (completions, reward functions).
        lengths: tokens per completion.
        active: tokens with a loss per completion.
        ended: whether each completion ended before the maximum length.
        entropy: sum over all tokens of the group, in nats.
        logged: values of the metrics that reward functions logged.
    """

    row: int
    rewards: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray
    active: np.ndarray
    ended: np.ndarray
    entropy: float
    logged: dict[str, list[float]] = field(default_factory=dict)


def compute_statistics(group: Group, config: RlConfig) -> GroupStatistics:
    """Returns the statistics of `group` that are sent to other processes."""
    lengths = np.array([len(completion.ids) for completion in group.completions])
    finished = np.array([completion.ended for completion in group.completions])
    active = np.where(finished, lengths, 0) if config.mask_truncated_completions else lengths
    entropy = sum(sum(completion.entropies) for completion in group.completions)
    row, rewards, scores = group.row.row, group.rewards, group.scores
    return GroupStatistics(row, rewards, scores, lengths, active, finished, entropy, group.metrics)


@dataclass
class Rollout:
    """Sampled completions that this process trains on, and metrics over all processes."""

    rows: list[CompletionRow]
    metrics: dict[str, float]


def create_training_rows(
    groups: Sequence[Group],
    all_groups: Sequence[GroupStatistics],
    config: RlConfig,
    old: TokenLogps | None,
    reference: TokenLogps | None,
    all_gather: Callable[[Any], list[Any]],
) -> list[CompletionRow]:
    """Returns the completions of `groups` as rows to train on, with advantages and weights.

    Completions with zero advantage are left out if there is neither a KL penalty nor a teacher.
    `all_groups` are the groups that the step trains on in all processes. `old` and `reference`
    compute log-probabilities under the sampling and reference model; None if the loss needs none.
    """
    rows = [row for group in groups for row in group.to_rows()]
    teacher_logps = [logps for group in groups for logps in group.teacher_logps or ()]
    old_logps = old(rows) if old is not None else [[UNKNOWN] * len(r.completion) for r in rows]
    reference_logps = reference(rows) if reference is not None else teacher_logps or None
    by_row = {facts.row: facts for facts in sorted(all_groups, key=lambda facts: facts.row)}
    order = {row: at for at, row in enumerate(by_row)}
    copies = Counter(facts.row for facts in all_groups)  # of a row, if a step has more than exist
    rewards = torch.from_numpy(np.stack([facts.rewards for facts in by_row.values()]))
    active = torch.from_numpy(np.stack([facts.active for facts in by_row.values()]))
    if reference is not None and reference_logps is not None and config.loss == "rloo":
        local_ratios = {
            (row.row, row.number): sum(a) - sum(b)
            for row, a, b in zip(rows, old_logps, reference_logps, strict=True)
        }
        log_ratios = torch.zeros_like(rewards)
        for part in all_gather(local_ratios):
            for (row, number), value in part.items():
                log_ratios[order[row], number] = value
        rewards = penalize_rewards(rewards, log_ratios, config.beta)
    advantages = compute_advantages(rewards, active, config.loss, config.scale)
    weights = completion_weights(active.flatten(), loss_parameters(config)).view_as(active)
    selected: list[CompletionRow] = []
    for at, row in enumerate(rows):
        index = order[row.row], row.number
        advantage, weight = float(advantages[index]), float(weights[index]) / copies[row.row]
        has_loss = advantage or config.beta or teacher_logps
        if not int(active[index]) or not has_loss:
            continue
        sampled = [signal[4] for signal in row.values]
        unknown = [UNKNOWN] * len(sampled)
        other_logps = unknown if reference_logps is None else reference_logps[at]
        logps = zip(old_logps[at], other_logps, sampled, strict=True)
        selected.append(replace(row, values=tuple((advantage, weight, *each) for each in logps)))
    return selected


def has_signal(statistics: GroupStatistics) -> bool:
    """Returns whether the rewards of the group differ; otherwise it has no gradient."""
    return bool(has_spread(torch.from_numpy(statistics.rewards)[None])[0])


def compute_metrics(
    all_groups: Sequence[GroupStatistics], names: Sequence[str]
) -> dict[str, float]:
    """Returns the log metrics of all sampled groups; `names` are the reward functions' names."""
    ordered = sorted(all_groups, key=lambda group: group.row)
    rewards = np.stack([group.rewards for group in ordered])
    scores = np.concatenate([group.scores for group in ordered])
    lengths = np.concatenate([group.lengths for group in ordered])
    finished = np.concatenate([group.ended for group in ordered])
    logged = dict.fromkeys(name for group in ordered for name in group.logged)
    metrics: dict[str, float] = {
        name: _mean(np.concatenate([group.logged.get(name, []) for group in ordered]))
        for name in logged
    }
    metrics |= {"reward": _mean(rewards), "group_std": _mean_std(rewards)}
    if len(names) > 1:
        metrics |= {f"reward_{name}": _mean(scores[:, at]) for at, name in enumerate(names)}
    if scores.shape[1] and rewards.shape[1] > 1:  # a teacher gives every token a signal
        mask = has_spread(torch.from_numpy(rewards)).numpy()
        metrics["groups_with_signal"] = float(mask.mean())
    metrics["completion_length"] = float(lengths.mean())
    metrics["truncated"] = float(1 - finished.mean())
    if any(group.entropy for group in ordered):  # a server returns none
        metrics["entropy"] = float(sum(group.entropy for group in ordered) / lengths.sum())
    metrics["completion_tokens"] = float(lengths.sum())
    return {name: value for name, value in metrics.items() if not np.isnan(value)}


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _mean_std(rewards: np.ndarray) -> float:
    groups = [row[~np.isnan(row)] for row in rewards]
    stds = [row.std(ddof=1) for row in groups if len(row) > 1]
    return float(np.mean(stds)) if stds else float("nan")


def bound_of(dtype: str, quantization: str) -> float:
    """Returns the largest mean |log-probability difference| (nats) explained by rounding."""
    return COARSE if quantization == "8bit" else ROUNDING.get(dtype, COARSE)


ROUNDING = {"float32": 2e-4}
"""Bound of the mean |Δℓ| between sampler and trainer in nats. Seven methods differ by 1.5e-6 at
most on a CPU (scripts/sampler_differences.py of commit 29ae4f80); TF32 was not measured."""

COARSE = 0.15
"""The same in half precision and 8 bits: 0.028 at most there, 0.046 with SmolLM2 in bfloat16. At a
temperature of 0.7 in place of 1, the difference is 0.88."""


MAX_BYTES = 64_000_000
"""Bytes of rollouts.jsonl up to which all completions of a step are written."""
MAX_CHARACTERS = 4_000
"""Characters of a completion that are written."""


class RolloutFile:
    """Appends all processes' groups to a file; one per step once the file exceeds `MAX_BYTES`."""

    def __init__(self, path: Path, processes: Processes) -> None:
        self._path, self._processes = path, processes

    def __call__(self, step: int, groups: Sequence[Group]) -> None:
        """Write the groups that were sampled when `step` optimizer steps had been made."""
        gathered = self._processes.all_gather([group.to_json() for group in groups])
        if not self._processes.is_first:
            return
        lines = sorted((line for part in gathered for line in part), key=lambda line: line["row"])
        if self._path.exists() and self._path.stat().st_size > MAX_BYTES:
            lines = lines[:1]
        with open_existing(self._path) as file:
            for line in lines:
                for completion in line["completions"]:
                    completion["text"] = completion["text"][:MAX_CHARACTERS]
                file.write(json.dumps({"step": step + 1, **line}, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Remove the groups sampled after step `step`; a resumed run samples them again."""
        if self._processes.is_first and self._path.exists():
            lines = [line for line in load_rollouts(self._path) if line["step"] <= step]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text(self._path, text)
