"""Advantages and completion weights against the formulas, written plainly."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from ftlevel.tasks.rl.losses import (
    PolicyLossParameters,
    combine_rewards,
    completion_weights,
    compute_advantages,
    policy_loss,
)

REWARDS = [[1.0, 0.0, 0.5, 0.0], [0.1, 0.1, 0.1, 0.1], [0.3, 0.9, math.nan, 0.2]]
LENGTHS = [[3, 5, 2, 7], [4, 4, 1, 1], [6, 2, 3, 5]]


def known(row: list[float]) -> list[float]:
    """Return the rewards that are not missing."""
    return [value for value in row if not math.isnan(value)]


def advantages(loss: str, scale: str = "group") -> list[list[float]]:
    """Return the advantages of the fixed rewards."""
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    found = compute_advantages(rewards, torch.tensor(LENGTHS), loss, scale)  # type: ignore[arg-type]
    return found.tolist()


def expected(of_group: object) -> list[list[float]]:
    """Return `of_group(reward, known rewards of the group)`; 0 without reward or spread."""
    return [
        [
            0.0 if math.isnan(value) or len(set(known(row))) == 1 else of_group(value, known(row))  # type: ignore[operator]
            for value in row
        ]
        for row in REWARDS
    ]


def close(found: list[list[float]], wanted: list[list[float]]) -> bool:
    return all(
        one == pytest.approx(other, abs=1e-12)
        for a, b in zip(found, wanted, strict=True)
        for one, other in zip(a, b, strict=True)
    )


def test_groups_are_normalized_by_their_own_deviation() -> None:
    wanted = expected(lambda r, g: (r - statistics.fmean(g)) / (statistics.stdev(g) + 1e-4))
    assert close(advantages("dapo"), wanted)


def test_batch_scale_divides_by_the_deviation_of_all_rewards() -> None:
    deviation = statistics.stdev(v for row in REWARDS for v in known(row)) + 1e-4
    wanted = expected(lambda r, g: (r - statistics.fmean(g)) / deviation)
    assert close(advantages("grpo", "batch"), wanted)


def test_no_scale_only_centers() -> None:
    assert close(advantages("dr_grpo", "none"), expected(lambda r, g: r - statistics.fmean(g)))


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    wanted = expected(lambda r, g: r - (sum(g) - r) / (len(g) - 1))
    assert close(advantages("rloo"), wanted)


def test_reinforce_whitens_over_all_tokens() -> None:
    tokens = [
        value
        for row, lengths in zip(REWARDS, LENGTHS, strict=True)
        for value, length in zip(row, lengths, strict=True)
        for _ in range(length)
        if not math.isnan(value)
    ]
    mean, variance = statistics.fmean(tokens), statistics.variance(tokens)
    wanted = [
        [0.0 if math.isnan(r) else (r - mean) / math.sqrt(variance + 1e-8) for r in row]
        for row in REWARDS
    ]
    assert close(advantages("reinforce++"), wanted)


def test_equal_rewards_have_no_advantage_however_they_round() -> None:
    rewards = torch.tensor([[0.1] * 3, [0.7] * 3], dtype=torch.float64)
    found = compute_advantages(rewards, torch.ones(2, 3), "grpo")
    assert found.eq(0).all()


def test_missing_scores_leave_a_function_out() -> None:
    scores = torch.tensor([[1.0, math.nan], [math.nan, math.nan], [0.5, 0.25]])
    combined = combine_rewards(scores, torch.tensor([1.0, 2.0]))
    assert combined[0] == 1.0
    assert combined[1].isnan()
    assert combined[2] == 1.0


@pytest.mark.parametrize("loss", ["dapo", "bnpo", "cispo", "reinforce++"])
def test_token_losses_are_means_over_active_tokens(loss: str) -> None:
    weights = completion_weights(torch.tensor([3, 0, 5]), PolicyLossParameters(loss))
    assert weights.tolist() == [1 / 8] * 3


def test_grpo_averages_over_completions_and_dr_grpo_divides_by_the_maximum() -> None:
    lengths = torch.tensor([4, 0, 2])
    assert completion_weights(lengths, PolicyLossParameters("grpo")).tolist() == [
        1 / 12,
        1 / 3,
        1 / 6,
    ]
    dr = completion_weights(lengths, PolicyLossParameters("dr_grpo", length=16))
    assert dr.tolist() == [1 / 48] * 3


def test_a_split_step_has_the_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([3, 5, 2, 4])
    owners = torch.arange(4).repeat_interleave(lengths)
    each = torch.randn(14, dtype=torch.float64)
    old = each + 0.3 * torch.randn(14, dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.5, 0.2, -0.7], dtype=torch.float64)[owners]
    for loss in ("dapo", "grpo", "gspo", "rloo", "cispo", "dr_grpo"):
        parameters = PolicyLossParameters(loss, beta=0.1)
        weights = completion_weights(lengths, parameters)[owners]
        whole = policy_loss(parameters, each, old, owners, advantages, weights, old - 0.1)
        parts = [
            policy_loss(
                parameters,
                each[chosen],
                old[chosen],
                owners[chosen] - first,
                advantages[chosen],
                weights[chosen],
                old[chosen] - 0.1,
            ).total
            for first in (0, 2)
            for chosen in [(owners == first) | (owners == first + 1)]
        ]
        assert float(torch.stack(parts).sum()) == pytest.approx(float(whole.total), abs=1e-12)
