"""Tests of on-policy distillation against plain loops, and of the divergence it minimizes."""

from __future__ import annotations

import math

import pytest
import torch

from ftlevel.extras.rl.config import TOKEN_LOSSES, RlConfig
from ftlevel.extras.rl.losses import completion_weights
from ftlevel.extras.rl.objective import PolicyGradient, loss_parameters

VOCAB_SIZE = 7
LENGTHS = (3, 1, 5)


def create_objective(loss: str) -> PolicyGradient:
    settings = RlConfig(loss=loss, max_completion_length=8)
    return PolicyGradient("reward", config=settings, teacher="teacher")


def build_signals(weights: torch.Tensor, old: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return (tokens, 5) signals; advantage and sampler log-probabilities are not used."""
    return torch.stack([torch.full_like(old, 9.0), weights, old, teacher, old], dim=1)


@pytest.mark.parametrize("loss", TOKEN_LOSSES)
@pytest.mark.parametrize("is_first", [True, False], ids=["first-iteration", "second-iteration"])
def test_loss_and_gradient_match_reference(loss: str, is_first: bool) -> None:
    torch.manual_seed(0)
    objective = create_objective(loss)
    parameters = loss_parameters(objective.config)
    lengths = torch.tensor(LENGTHS)
    owners = torch.arange(len(lengths)).repeat_interleave(lengths)
    logits = torch.randn(len(owners), VOCAB_SIZE, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(VOCAB_SIZE, (len(owners), 1))
    logps = logits.log_softmax(-1).gather(1, tokens)[:, 0]
    teacher = torch.randn_like(logits).log_softmax(-1).gather(1, tokens)[:, 0]
    old = logps.detach() + (0 if is_first else 0.4) * torch.randn_like(logps)
    weights = completion_weights(lengths, parameters)[owners]
    stored = torch.full_like(old, math.nan) if is_first else old
    total = objective.policy_sum(logps, owners, build_signals(weights, stored, teacher))
    (gradient,) = torch.autograd.grad(total, logits)

    reference = torch.zeros((), dtype=torch.float64)
    log_probs = logits.log_softmax(-1)
    for index, owner in enumerate(owners.tolist()):
        n, count = LENGTHS[owner], len(LENGTHS)
        weight = {"grpo": 1 / (count * n), "dr_grpo": 1 / (count * 8)}.get(loss, 1 / sum(LENGTHS))
        logp = log_probs[index, tokens[index, 0]]
        advantage = float(teacher[index] - old[index])
        ratio = (logp - old[index]).exp()
        if loss == "cispo":
            term = -min(float(ratio), 5.0) * advantage * logp
        else:
            high = 1.28 if loss == "dapo" else 1.2
            term = -torch.minimum(ratio * advantage, ratio.clamp(0.8, high) * advantage)
        reference = reference + weight * term
    (expected,) = torch.autograd.grad(reference, logits)
    assert total.item() == pytest.approx(reference.item(), rel=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-14)
    assert gradient.abs().max() > 1e-3


def test_expected_gradient_is_reverse_kl_gradient() -> None:
    torch.manual_seed(0)
    objective = create_objective("dapo")
    logits = torch.randn(VOCAB_SIZE, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(VOCAB_SIZE, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    divergence = (policy.exp() * (policy - teacher)).sum()
    (expected,) = torch.autograd.grad(divergence, logits)

    mean_gradient = torch.zeros_like(logits)
    for token in range(VOCAB_SIZE):
        logps = logits.log_softmax(-1)[token : token + 1]
        signals = build_signals(torch.ones_like(logps), logps.detach(), teacher[token : token + 1])
        total = objective.policy_sum(logps, torch.tensor([0]), signals)
        mean_gradient += policy[token].exp().detach() * torch.autograd.grad(total, logits)[0]
    assert torch.allclose(mean_gradient, expected, rtol=1e-12, atol=1e-14)
