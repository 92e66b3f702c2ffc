"""Losses and gradients of all eight formulas equal to plain loops in float64."""

from __future__ import annotations

import pytest
import torch

import rl_figures as given
from ftlevel.tasks.rl.losses import (
    PolicyLossParameters,
    completion_weights,
    compute_advantages,
    penalize_rewards,
    policy_loss,
)
from preference_figures import build_model, norms


def found(case: given.Case, *, order: list[int], parts: int) -> tuple[float, float, float]:
    """Return loss and gradient norms by ftlevel, completions in `order` and in `parts` parts."""
    model = build_model().double()
    policy, reference = given.log_probabilities(model), given.reference_logps()
    old = given.old_logps(policy, case)
    low, high = given.CLIP[case.loss]
    parameters = PolicyLossParameters(case.loss, low, high, case.beta, given.LENGTH, case.corrected)
    rewards = torch.tensor(given.REWARDS, dtype=torch.float64)
    if case.loss == "rloo" and case.beta:
        sums = [torch.stack([each.sum() for each in known]) for known in (old, reference)]
        rewards = penalize_rewards(rewards, sums[0] - sums[1], case.beta)
    lengths = torch.tensor(
        [len(each) if given.is_active(i, case) else 0 for i, each in enumerate(policy)]
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
        chosen = active[part::parts]
        owners = [torch.full((len(policy[i]),), at) for at, i in enumerate(chosen)]
        rows = torch.tensor(chosen)[torch.cat(owners)]
        total = (
            total
            + policy_loss(
                parameters,
                torch.cat([policy[i] for i in chosen]),
                torch.cat([old[i] for i in chosen]),
                torch.cat(owners),
                advantages[rows],
                weights[rows],
                torch.cat([reference[i] for i in chosen]) if case.beta else None,
            ).total
        )
    total.backward()
    return total.item(), *norms(model)


@pytest.mark.parametrize("case", given.CASES, ids=str)
def test_loss_and_gradient(case: given.Case) -> None:
    wanted = given.figures(case)
    assert found(case, order=list(range(8)), parts=1) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    shuffled = found(case, order=[5, 2, 7, 0, 3, 6, 1, 4], parts=3)
    assert shuffled == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_clipping_acts_in_the_figures() -> None:
    for loss in given.CLIP:
        case = given.Case(loss)
        assert given.figures(case)[1:] != pytest.approx(
            given.figures(given.Case(loss, off_policy=False))[1:], rel=1e-3
        )
