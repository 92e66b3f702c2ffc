"""Check before training that rewards differ, and that sampler and trainer agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch

from ftlevel.config.section import Choice
from ftlevel.errors import RunError
from ftlevel.events import Listener
from ftlevel.extras.rl.config import RlConfig
from ftlevel.extras.rl.losses import GLOBAL, has_spread
from ftlevel.extras.rl.rollouts import BEFORE, Group, Rollouts
from ftlevel.extras.rl.step import (
    GroupStatistics,
    compute_metrics,
    compute_statistics,
    has_signal,
)
from ftlevel.extras.rl.trainer import RlTrainer, check_sampler
from ftlevel.models.hardware import trim_heap

MAX_TRUNCATED = 0.9
"""Share of truncated completions beyond which a run stops."""

_MAX_CHARACTERS = 160  # characters of an example

_NONE_ADVICE = "Return a number for some rows, or add another --reward."
_EQUAL_ADVICE = (
    "Use easier prompts, more --num-generations, a supervised run first (--adapter RUN), or a "
    "reward with steps between 0 and 1."
)


def check_before(trainer: RlTrainer, prompts: Sequence[Any], listener: Listener) -> None:
    """Sample completions of some `prompts` before training and show them.

    Raises RunError if no prompt's completions differ in reward, almost all are truncated, or
    log-probabilities of sampler and trainer differ.
    """
    if not trainer.rl_config.check_groups:
        return
    config, processes = trainer.rl_config, trainer.processes
    listener.stage("sampling before training")
    trim_heap()
    local = select_prompts(prompts, config.check_groups)[processes.world.rank :: processes.count]
    groups = processes.in_all(lambda: trainer.rollouts(BEFORE, local))
    gathered = processes.all_gather([compute_statistics(group, config) for group in groups])
    statistics = [group for part in gathered for group in part]
    if trainer.rollouts.sampler is not None:
        listener.choices("rollouts", [trainer.rollouts.sampler])
    metrics = compute_metrics(statistics, config.reward_names)
    logp_differences = processes.all_gather(_compare_logps(trainer, groups))
    mean = max(part[0] for part in logp_differences)
    difference = f"sampler and trainer differ by {mean:.1e} nats a token"
    agreement = Choice("log-probabilities", difference, "rounding")
    listener.choices("reward check", [*describe(metrics, statistics, groups), agreement])
    check_sampler(mean, max(part[1] for part in logp_differences), trainer.bound, "before training")
    if problem := find_problem(metrics, statistics, config):
        raise RunError(problem)


def select_prompts(prompts: Sequence[Any], num_prompts: int) -> list[Any]:
    """Returns `num_prompts` of `prompts`, evenly spaced over the data."""
    num_prompts = min(num_prompts, len(prompts))
    return [prompts[at * len(prompts) // num_prompts] for at in range(num_prompts)]


def preview_rollouts(rollouts: Rollouts, prompts: Sequence[Any]) -> list[Choice]:
    """Returns printed lines on completions that `rollouts` samples, as `check_before` shows."""
    config = rollouts.settings
    groups = rollouts(BEFORE, select_prompts(prompts, config.check_groups))
    statistics = [compute_statistics(group, config) for group in groups]
    metrics = compute_metrics(statistics, config.reward_names)
    choices = describe(metrics, statistics, groups)
    problem = find_problem(metrics, statistics, config)
    return [*choices, *([Choice("would stop the run", problem)] if problem else [])]


def _compare_logps(trainer: RlTrainer, groups: Sequence[Group]) -> tuple[float, float]:
    """Returns mean and maximum over all tokens of |log-probability of sampler − of trainer|."""
    rows = [row for group in groups for row in group.to_rows()]
    sampled = np.array([signal[4] for row in rows for signal in row.values])
    trained = np.array([logp for row in trainer.token_logps(rows) for logp in row])
    diff = np.abs(trained - sampled)
    return (float(diff.mean()), float(diff.max())) if len(diff) else (0.0, 0.0)


def describe(
    metrics: dict[str, float], statistics: Sequence[GroupStatistics], groups: Sequence[Group]
) -> list[Choice]:
    """Returns lines with `metrics` of the groups, and their best and worst completion by reward."""
    reward = f"{metrics.get('reward', float('nan')):.3f} on average"
    each = [f"{name[7:]} {v:.3f}" for name, v in metrics.items() if name.startswith("reward_")]
    choices = [Choice("reward", reward, ", ".join([f"{len(statistics)} prompts", *each]))]
    if (share := metrics.get("groups_with_signal")) is not None:
        reason = "their rewards differ; other groups have no gradient"
        choices.append(Choice("groups with signal", f"{share:.0%}", reason))
    if share := metrics.get("failed_rewards"):
        choices.append(Choice("failed rewards", f"{share:.0%}", "their scores count as 0"))
    length = f"{metrics['completion_length']:.0f} tokens on average"
    reason = f"{metrics['truncated']:.0%} are cut at the maximum length"
    choices.append(Choice("length", length, reason))
    completions = [
        (float(reward), text)
        for group in groups
        for reward, text in zip(group.rewards, group.texts, strict=True)
        if not np.isnan(reward)
    ]
    for name, select in (("best", max), ("worst", min)) if completions else ():
        value, text = select(completions, key=lambda pair: pair[0])
        excerpt = " ".join(text.split())[:_MAX_CHARACTERS]
        choices.append(Choice(f"{name} completion", repr(excerpt), f"reward {value:.3f}"))
    return choices


def find_problem(
    metrics: dict[str, float], statistics: Sequence[GroupStatistics], config: RlConfig
) -> str:
    """Returns why training on these sampled groups would fail, with advice; "" if it would not."""
    length = config.max_completion_length
    if config.reward and metrics["truncated"] > MAX_TRUNCATED:  # a teacher scores every token
        return (
            f"{metrics['truncated']:.0%} of the completions are cut at {length:,} tokens before "
            "they end, so the rewards do not apply to complete answers. Raise "
            "--max-completion-length, end completions by --stop TEXT, or train on such answers "
            "first (--task text-generation). --check-groups 0 skips this check."
        )
    if "reward" not in metrics:
        return (
            "no reward applies to any of the sampled completions: all scores are None. "
            f"{_NONE_ADVICE} --check-groups 0 skips this check."
        )
    completions = f"in all {len(statistics)} sampled groups all completions of a prompt"
    has_any = "groups_with_signal" not in metrics or any(map(has_signal, statistics))
    if config.loss in GLOBAL:
        rewards = np.concatenate([group.rewards for group in statistics])
        completions = f"all {len(rewards)} sampled completions"
        has_any = bool(has_spread(torch.from_numpy(rewards)[None])[0])
    same = f"{completions} have the same reward (mean {metrics['reward']:.3f})"
    advice = f"so there is no learning signal. {_EQUAL_ADVICE} --check-groups 0 skips this check."
    return "" if has_any else f"{same}, {advice}"


def get_no_effect_cause(config: RlConfig, records: Sequence[Mapping[str, Any]]) -> str:
    """Returns why the rewards gave no gradient in any logged step, and advice; "" if unknown."""
    sampled = [record for record in records if "truncated" in record]
    if not sampled:
        return ""
    if config.mask_truncated_completions and all(record["truncated"] == 1 for record in sampled):
        return (
            f"All completions were cut at {config.max_completion_length:,} tokens, and "
            "--mask-truncated-completions excludes them. Raise --max-completion-length."
        )
    if not any("reward" in record for record in sampled):
        return f"No reward applied to any completion: all scores were None. {_NONE_ADVICE}"
    if all(record.get("groups_with_signal") == 0 for record in sampled):
        return (
            "In every logged step, all completions of each prompt had the same reward, so there "
            f"was no gradient. {_EQUAL_ADVICE}"
        )
    return ""


_WINDOW = 0.2
"""Share of the steps at each end of a run whose means are compared."""

RAN_LONGER, COLLAPSED = 0.2, 0.1
"""Increase of the truncated share, and share of the initial entropy, that are warned about."""


def get_rollout_warnings(config: RlConfig, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns warnings of runs with rewards: reward and cut share rose, or entropy collapsed."""
    sampled = [record for record in records if "completion_length" in record]
    window = max(1, int(_WINDOW * len(sampled)))
    if len(sampled) < 2 * window or not config.reward:
        return []

    def ends(name: str) -> tuple[float, float]:
        windows = (sampled[:window], sampled[-window:])
        first, last = ([r[name] for r in part if name in r] for part in windows)
        return (fmean(first), fmean(last)) if first and last else (0.0, 0.0)

    reward, length, truncated, entropy = map(
        ends, ("reward", "completion_length", "truncated", "entropy")
    )
    messages = []
    if reward[1] > reward[0] and truncated[1] > max(truncated[0] + RAN_LONGER, 0.5):
        messages.append(
            f"the reward rose ({reward[0]:.2f} to {reward[1]:.2f}) while completions ran to the "
            f"maximum length ({truncated[0]:.0%} to {truncated[1]:.0%} are cut, mean length "
            f"{length[0]:.0f} to {length[1]:.0f} tokens): the model may be paid for length. Look "
            "at rollouts.jsonl; add --reward length:MIN-MAX, or --mask-truncated-completions."
        )
    if entropy[0] and entropy[1] < COLLAPSED * entropy[0]:
        messages.append(
            f"the entropy of a token fell from {entropy[0]:.2f} to {entropy[1]:.2f} nats: the "
            "completions of a prompt are almost the same, so little can still improve. Use a "
            "lower --learning-rate, --beta, or fewer steps."
        )
    return messages
