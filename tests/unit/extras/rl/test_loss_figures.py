"""Tests that losses and gradients of all eight policy losses match plain float64 loops."""

from __future__ import annotations

import pytest
import torch

import rl_figures as given
from ftlevel.extras.rl.losses import (
    PolicyLossParameters,
    completion_weights,
    compute_advantages,
    penalize_rewards,
    policy_loss,
)
from preference_figures import build_model, gradient_norms


def compute_loss_and_norms(
    case: given.Case, *, order: list[int], parts: int
) -> tuple[float, float, float]:
    """Return ftlevel's loss and gradient norms for completions in `order`, in `parts` parts."""
    model = build_model().double()
    policy, reference = given.log_probabilities(model), given.reference_log_probabilities()
    old = given.old_log_probabilities(policy, case)
    low, high = given.CLIP[case.loss]
    parameters = PolicyLossParameters(case.loss, low, high, case.beta, given.LENGTH, case.corrected)
    rewards = torch.tensor(given.REWARDS, dtype=torch.float64)
    if case.loss == "rloo" and case.beta:
        sums = [torch.stack([logps.sum() for logps in source]) for source in (old, reference)]
        rewards = penalize_rewards(rewards, sums[0] - sums[1], case.beta)
    lengths = torch.tensor(
        [len(logps) if given.is_active(i, case) else 0 for i, logps in enumerate(policy)]
    )
    groups = (-1, given.GROUP)
    scale = {"dr_grpo": "none", "rloo": "none"}.get(case.loss, "group")
    advantages = compute_advantages(
        rewards.view(groups), lengths.view(groups), case.loss, scale
    ).flatten()
    weights = completion_weights(lengths, parameters)
    active = [i for i in order if lengths[i]]
    total = torch.zeros((), dtype=torch.float64)
    for part in range(parts):
        selected = active[part::parts]
        owners = [torch.full((len(policy[i]),), index) for index, i in enumerate(selected)]
        rows = torch.tensor(selected)[torch.cat(owners)]
        total = (
            total
            + policy_loss(
                parameters,
                torch.cat([policy[i] for i in selected]),
                torch.cat([old[i] for i in selected]),
                torch.cat(owners),
                advantages[rows],
                weights[rows],
                torch.cat([reference[i] for i in selected]) if case.beta else None,
            ).total
        )
    total.backward()
    return total.item(), *gradient_norms(model)


@pytest.mark.parametrize("case", given.CASES, ids=str)
def test_loss_and_gradient_match_reference(case: given.Case) -> None:
    expected = given.loss_and_norms(case)
    assert compute_loss_and_norms(case, order=list(range(8)), parts=1) == pytest.approx(
        expected, rel=1e-9, abs=1e-12
    )
    shuffled = compute_loss_and_norms(case, order=[5, 2, 7, 0, 3, 6, 1, 4], parts=3)
    assert shuffled == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_clipping_changes_reference_values() -> None:
    for loss in given.CLIP:
        case = given.Case(loss)
        assert given.loss_and_norms(case)[1:] != pytest.approx(
            given.loss_and_norms(given.Case(loss, off_policy=False))[1:], rel=1e-3
        )
