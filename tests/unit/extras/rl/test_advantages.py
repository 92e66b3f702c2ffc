"""Tests of advantages and completion weights against plainly written formulas."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from ftlevel.extras.rl.losses import (
    PolicyLossParameters,
    combine_rewards,
    completion_weights,
    compute_advantages,
    policy_loss,
)

REWARDS = [[1.0, 0.0, 0.5, 0.0], [0.1, 0.1, 0.1, 0.1], [0.3, 0.9, math.nan, 0.2]]
LENGTHS = [[3, 5, 2, 7], [4, 4, 1, 1], [6, 2, 3, 5]]


def drop_missing(row: list[float]) -> list[float]:
    """Return the rewards that are not NaN."""
    return [value for value in row if not math.isnan(value)]


def compute_fixed_advantages(loss: str, scale: str = "group") -> list[list[float]]:
    """Return the advantages of the fixed rewards."""
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    result = compute_advantages(rewards, torch.tensor(LENGTHS), loss, scale)  # type: ignore[arg-type]
    return result.tolist()


def compute_reference(compute: object) -> list[list[float]]:
    """Return `compute(reward, known rewards of the group)`, or 0 without reward or spread."""
    return [
        [
            0.0
            if math.isnan(value) or len(set(drop_missing(row))) == 1
            else compute(value, drop_missing(row))  # type: ignore[operator]
            for value in row
        ]
        for row in REWARDS
    ]


def are_close(actual: list[list[float]], reference: list[list[float]]) -> bool:
    return all(
        x == pytest.approx(y, abs=1e-12)
        for a, b in zip(actual, reference, strict=True)
        for x, y in zip(a, b, strict=True)
    )


def test_group_scale_divides_by_group_deviation() -> None:
    reference = compute_reference(
        lambda r, g: (r - statistics.fmean(g)) / (statistics.stdev(g) + 1e-4)
    )
    assert are_close(compute_fixed_advantages("dapo"), reference)


def test_batch_scale_divides_by_batch_deviation() -> None:
    deviation = statistics.stdev(v for row in REWARDS for v in drop_missing(row)) + 1e-4
    reference = compute_reference(lambda r, g: (r - statistics.fmean(g)) / deviation)
    assert are_close(compute_fixed_advantages("grpo", "batch"), reference)


def test_none_scale_only_centers() -> None:
    assert are_close(
        compute_fixed_advantages("dr_grpo", "none"),
        compute_reference(lambda r, g: r - statistics.fmean(g)),
    )


def test_rloo_subtracts_mean_of_other_rewards() -> None:
    reference = compute_reference(lambda r, g: r - (sum(g) - r) / (len(g) - 1))
    assert are_close(compute_fixed_advantages("rloo"), reference)


def test_reinforce_normalizes_over_all_tokens() -> None:
    tokens = [
        value
        for row, lengths in zip(REWARDS, LENGTHS, strict=True)
        for value, length in zip(row, lengths, strict=True)
        for _ in range(length)
        if not math.isnan(value)
    ]
    mean, variance = statistics.fmean(tokens), statistics.variance(tokens)
    reference = [
        [0.0 if math.isnan(r) else (r - mean) / math.sqrt(variance + 1e-8) for r in row]
        for row in REWARDS
    ]
    assert are_close(compute_fixed_advantages("reinforce++"), reference)


def test_equal_rewards_have_zero_advantage() -> None:
    rewards = torch.tensor([[0.1] * 3, [0.7] * 3], dtype=torch.float64)
    advantages_of_equal = compute_advantages(rewards, torch.ones(2, 3), "grpo")
    assert advantages_of_equal.eq(0).all()


def test_missing_scores_are_skipped_when_combined() -> None:
    scores = torch.tensor([[1.0, math.nan], [math.nan, math.nan], [0.5, 0.25]])
    combined = combine_rewards(scores, torch.tensor([1.0, 2.0]))
    assert combined[0] == 1.0
    assert combined[1].isnan()
    assert combined[2] == 1.0


@pytest.mark.parametrize("loss", ["dapo", "bnpo", "cispo", "reinforce++"])
def test_token_losses_average_over_active_tokens(loss: str) -> None:
    weights = completion_weights(torch.tensor([3, 0, 5]), PolicyLossParameters(loss))
    assert weights.tolist() == [1 / 8] * 3


def test_completion_weights_of_grpo_and_dr_grpo() -> None:
    lengths = torch.tensor([4, 0, 2])
    assert completion_weights(lengths, PolicyLossParameters("grpo")).tolist() == [
        1 / 12,
        1 / 3,
        1 / 6,
    ]
    dr = completion_weights(lengths, PolicyLossParameters("dr_grpo", length=16))
    assert dr.tolist() == [1 / 48] * 3


def test_split_step_sums_to_full_loss() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([3, 5, 2, 4])
    owners = torch.arange(4).repeat_interleave(lengths)
    logps = torch.randn(14, dtype=torch.float64)
    old = logps + 0.3 * torch.randn(14, dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.5, 0.2, -0.7], dtype=torch.float64)[owners]
    for loss in ("dapo", "grpo", "gspo", "rloo", "cispo", "dr_grpo"):
        parameters = PolicyLossParameters(loss, beta=0.1)
        weights = completion_weights(lengths, parameters)[owners]
        full = policy_loss(parameters, logps, old, owners, advantages, weights, old - 0.1)
        partial_losses = [
            policy_loss(
                parameters,
                logps[selected],
                old[selected],
                owners[selected] - first,
                advantages[selected],
                weights[selected],
                old[selected] - 0.1,
            ).total
            for first in (0, 2)
            for selected in [(owners == first) | (owners == first + 1)]
        ]
        assert float(torch.stack(partial_losses).sum()) == pytest.approx(
            float(full.total), abs=1e-12
        )
