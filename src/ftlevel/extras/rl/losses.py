"""Policy losses of reinforcement learning: advantages, clipped ratios, and their normalization.

    L = Σᵢ wᵢ Σₜ [ Lᵢₜ + β k3ᵢₜ ],   Lᵢₜ = −min(ρᵢₜ Aᵢ, clip(ρᵢₜ, 1 − ε, 1 + ε_high) Aᵢ)
    ρᵢₜ = exp(ℓᵢₜ − ℓ_oldᵢₜ),   k3 = exp(ℓ_ref − ℓ) − (ℓ_ref − ℓ) − 1

`wᵢ` are computed over all completions of an optimizer step, so the sum does not depend on how the
step is split. A completion that no function scores has the reward NaN.

| loss | ratio | wᵢ |
|---|---|---|
| dapo (2503.14476), bnpo | token | 1 / unmasked tokens of the step |
| grpo (2402.03300) | token | 1 / (completions · own tokens) |
| dr_grpo (2503.20783) | token | 1 / (completions · maximum length) |
| gspo (2507.18071) | exp of the mean over tokens | as grpo |
| cispo (2506.13585) | token, −sg[min(ρ, ε_high)] A ℓ | as dapo |
| rloo (2402.14740) | exp of the sum over tokens | as grpo |
| reinforce++ (2501.03262) | token | as dapo |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ftlevel.extras.rl.config import Scale

STD_EPSILON = 1e-4
"""Added to a standard deviation, as in TRL."""

WHITENING_EPSILON = 1e-8
"""Added to a variance, as in verl's `masked_whiten`."""

GLOBAL = ("reinforce++",)
"""Losses whose advantages are normalized over the batch without a group mean."""

_SEQUENCE = ("gspo", "rloo")
_BY_COMPLETION = ("grpo", "gspo", "rloo")


@dataclass(frozen=True)
class PolicyLossParameters:
    """Parameters of the policy loss named `loss`.

    The ratio is clipped above at 1 + `epsilon_high`, with cispo at `epsilon_high`. `length` is the
    maximum number of tokens of a completion. `corrects_kl` multiplies the KL estimate by the ratio,
    as TRL 1.16 does.
    """

    loss: str
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    length: int = 512
    corrects_kl: bool = False


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss summed over tokens (a scalar), and sums of detached statistics.

    `clipped` is the number of tokens whose ratio is clipped, `kl` the summed estimate of the KL
    divergence from the reference.
    """

    total: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor


def combine_rewards(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns weighted sums of `scores` `(completions, functions)` without NaN; NaN if all are."""
    total = (scores * weights).nansum(-1)
    return torch.where(scores.isnan().all(-1), torch.nan, total)


def compute_advantages(
    rewards: torch.Tensor, lengths: torch.Tensor, loss: str, scale: Scale = "group"
) -> torch.Tensor:
    """Returns the float64 advantages `(groups, completions)` of `rewards` of the same shape.

    Completions with NaN rewards get 0 and do not count in means. A group of equal rewards gets
    exactly 0, except for losses in `GLOBAL`. `lengths`, used by reinforce++ only, are the
    unmasked tokens of the completions. `scale` selects the standard deviation to divide by (group,
    batch or none), except for rloo and losses in `GLOBAL`.
    """
    rewards = rewards.double()
    if loss in GLOBAL:
        return _whiten(rewards, lengths)
    is_scored = ~rewards.isnan()
    count = is_scored.sum(-1, keepdim=True)
    centered = rewards - rewards.nanmean(-1, keepdim=True)
    if loss == "rloo":  # r − mean of the others = G/(G − 1) · (r − mean)
        advantages = centered * count / (count - 1).clamp(min=1)
    elif scale == "none":
        advantages = centered
    else:
        std = (
            _std(rewards, is_scored, count) if scale == "group" else _std_of_all(rewards[is_scored])
        )
        advantages = centered / (std + STD_EPSILON)
    return torch.where(is_scored & has_spread(rewards)[:, None], advantages, 0.0)


def has_spread(rewards: torch.Tensor) -> torch.Tensor:
    """Returns the mask `(groups,)` of groups in which `rewards` `(groups, completions)` differ."""
    low = rewards.nan_to_num(nan=torch.inf).amin(-1)
    return rewards.nan_to_num(nan=-torch.inf).amax(-1) > low


def _std(rewards: torch.Tensor, is_scored: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    centered = torch.where(is_scored, rewards - rewards.nanmean(-1, keepdim=True), 0.0)
    return (centered.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def _std_of_all(rewards: torch.Tensor) -> torch.Tensor:
    return rewards.std() if len(rewards) > 1 else rewards.new_zeros(())


def _whiten(rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Returns rewards whitened over all tokens, each of which has its completion's reward."""
    counts = torch.where(rewards.isnan(), 0, lengths).double()
    values = rewards.nan_to_num()
    total = counts.sum()
    mean = (values * counts).sum() / total
    variance = ((values - mean).square() * counts).sum() / (total - 1).clamp(min=1)
    whitened = (values - mean) * (variance + WHITENING_EPSILON).rsqrt()
    return torch.where(rewards.isnan() | (variance == 0), 0.0, whitened)


def completion_weights(lengths: torch.Tensor, parameters: PolicyLossParameters) -> torch.Tensor:
    """Returns the weight w of each completion's tokens in the loss, `(completions,)` float64.

    `lengths` are the unmasked tokens of all completions of an optimizer step. A completion whose
    tokens are masked has length 0; it counts in means over completions, as in TRL.
    """
    lengths = lengths.double()
    if parameters.loss in _BY_COMPLETION:
        return 1 / (len(lengths) * lengths.clamp(min=1))
    if parameters.loss == "dr_grpo":
        return torch.full_like(lengths, 1 / (len(lengths) * parameters.length))
    return torch.full_like(lengths, 1.0) / lengths.sum().clamp(min=1)


def policy_loss(
    parameters: PolicyLossParameters,
    log_probs: torch.Tensor,
    old: torch.Tensor,
    owners: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    reference: torch.Tensor | None,
) -> PolicyLoss:
    """Returns the loss summed over tokens, each multiplied by its weight.

    Args:
        parameters: loss and clipping.
        log_probs: (tokens,) log-probabilities of the policy, with gradient.
        old: (tokens,) log-probabilities of the sampling policy; `log_probs` on the first iteration.
        owners: (tokens,) index of each token's completion, all of whose tokens are here.
        advantages: (tokens,); the same for all tokens of a completion, except in distillation.
        weights: (tokens,), from `completion_weights`.
        reference: (tokens,) log-probabilities of the reference, for a KL penalty. If `beta` is 0,
            the KL is only measured.
    """
    advantages, weights = advantages.to(log_probs.dtype), weights.to(log_probs.dtype)
    log_ratio = log_probs - old
    if parameters.loss in _SEQUENCE:
        log_ratio = _over_completions(log_ratio, owners, parameters.loss)
    ratio = log_ratio.exp()
    if parameters.loss == "cispo":
        loss = -ratio.detach().clamp(max=parameters.epsilon_high) * advantages * log_probs
        clipped = (ratio > parameters.epsilon_high) & (advantages > 0)
    else:
        low, high = 1 - parameters.epsilon, 1 + parameters.epsilon_high
        loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    kl = torch.zeros_like(log_probs)
    if reference is not None:
        log_ratio_ref = reference - log_probs
        kl = log_ratio_ref.expm1() - log_ratio_ref  # exp(x) - 1 is 0 in float32 below 6e-8
        kl = kl * ratio if parameters.corrects_kl else kl
        if parameters.loss != "rloo":  # there the reward is reduced instead
            loss = loss + parameters.beta * kl
    return PolicyLoss((loss * weights).sum(), clipped.sum(), kl.detach().sum())


def _over_completions(log_ratio: torch.Tensor, owners: torch.Tensor, loss: str) -> torch.Tensor:
    """Returns for each token the mean (gspo) or sum (rloo) of `log_ratio` over its completion."""
    zeros = torch.zeros_like(log_ratio)  # there are no more completions than tokens
    sums = zeros.index_add(0, owners, log_ratio)
    if loss == "gspo":
        sums = sums / zeros.index_add(0, owners, torch.ones_like(log_ratio)).clamp(min=1)
    return sums[owners]


def penalize_rewards(rewards: torch.Tensor, log_ratios: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns `rewards` minus `beta` · `log_ratios`, the KL penalty of rloo.

    `log_ratios` are log π_old − log π_ref, summed over the tokens of each completion.
    """
    return rewards - beta * log_ratios
