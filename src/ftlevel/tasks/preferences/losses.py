"""Preference losses as functions of answer log-likelihoods.

With prompt x, preferred and rejected answers y+ and y-, n their tokens with EOS, lp the sum of
their log-probabilities, r = lp - lp of the reference, and h = r+ - r-:

    dpo       -log σ(βh)                                             Rafailov et al., 2305.18290
    cdpo      -(1 - ε) log σ(βh) - ε log σ(-βh)                      Mitchell, 2023
    robust    [-(1 - ε) log σ(βh) + ε log σ(-βh)] / (1 - 2ε)         Chowdhury et al., 2403.00409
    hinge     max(0, 1 - βh)                                         Zhao et al., 2305.10425
    ipo       (h̄ - 1 / 2β)², h̄ = r+/n+ - r-/n-                       Azar et al., 2310.12036
    dpo-norm  -log σ(βh̄)                                             Lambert et al., 2411.15124
    ld-dpo    dpo of sums in which tokens beyond min(n+, n-) weigh α Liu et al., 2409.06411
    rpo       dpo - α lp+/n+                                         Pang et al., 2404.19733
    simpo     -log σ(β (lp+/n+ - lp-/n-) - γ)                        Meng et al., 2405.14734
    cpo       -log σ(β (lp+ - lp-)) - α lp+/n+                       Xu et al., 2401.08417
    orpo      -lp+/n+ - β log σ(o+ - o-), o = log p̄/(1 - p̄)          Hong et al., 2403.07691
    kto       λ (1 - σ(β (r - z))) of a good answer,                 Ethayarajh et al., 2402.01306
              λ (1 - σ(β (z - r))) of a bad one
    reward    -log σ(s+ - s- - m) + c (s+ + s-)²                     Touvron et al., 2307.09288

with p̄ = exp(lp/n), s the reward model's scores, and z the mean over the step of r(x, y') with
another row's answer y', clamped to at least 0 and detached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ftlevel.config.preference import PreferenceConfig


@dataclass(frozen=True)
class AnswerLikelihoods:
    """Log-likelihoods of the answers of a batch; float32 tensors `(answers,)`.

    `sums` are log-likelihoods, `counts` tokens, `reference` those of the reference (0 without one).
    """

    sums: torch.Tensor
    counts: torch.Tensor
    reference: torch.Tensor

    @property
    def ratios(self) -> torch.Tensor:
        """Log-likelihood ratios of policy and reference."""
        return self.sums - self.reference

    def every_other(self, first: int) -> AnswerLikelihoods:
        """Return every second answer, starting at index `first`."""
        own = slice(first, None, 2)
        return AnswerLikelihoods(self.sums[own], self.counts[own], self.reference[own])

    @property
    def means(self) -> torch.Tensor:
        """Mean log-likelihood per token."""
        return self.sums / self.counts


@dataclass(frozen=True)
class PairLossParameters:
    """Hyperparameters of the pair losses: β, ε (smoothing), γ of simpo, and the ratios of ipo."""

    beta: float
    smoothing: float
    gamma: float
    ipo_sums: bool

    @classmethod
    def of(cls, settings: PreferenceConfig, smoothing: float) -> PairLossParameters:
        """Return the hyperparameters of a configuration."""
        sums = settings.ipo_ratios == "sum"
        return cls(settings.effective_beta, smoothing, settings.margin, sums)


PairLoss = Callable[[AnswerLikelihoods, AnswerLikelihoods, PairLossParameters], "torch.Tensor"]
"""(preferred answers, rejected answers, hyperparameters) -> loss of each pair."""


def log_sigmoid(value: torch.Tensor) -> torch.Tensor:
    """Return log σ."""
    from torch.nn import functional

    return functional.logsigmoid(value)


def _dpo(good: AnswerLikelihoods, bad: AnswerLikelihoods, told: PairLossParameters) -> torch.Tensor:
    return -log_sigmoid(told.beta * (good.ratios - bad.ratios))


def _cdpo(
    good: AnswerLikelihoods, bad: AnswerLikelihoods, told: PairLossParameters
) -> torch.Tensor:
    reward = told.beta * (good.ratios - bad.ratios)
    swapped = told.smoothing * log_sigmoid(-reward)
    return -(1 - told.smoothing) * log_sigmoid(reward) - swapped


def _robust(
    good: AnswerLikelihoods, bad: AnswerLikelihoods, told: PairLossParameters
) -> torch.Tensor:
    reward = told.beta * (good.ratios - bad.ratios)
    swapped = told.smoothing * log_sigmoid(-reward)
    return (swapped - (1 - told.smoothing) * log_sigmoid(reward)) / (1 - 2 * told.smoothing)


def _hinge(
    good: AnswerLikelihoods, bad: AnswerLikelihoods, told: PairLossParameters
) -> torch.Tensor:
    return (1 - told.beta * (good.ratios - bad.ratios)).relu()


def _mean_difference(good: AnswerLikelihoods, bad: AnswerLikelihoods) -> torch.Tensor:
    return good.ratios / good.counts - bad.ratios / bad.counts


def _ipo(good: AnswerLikelihoods, bad: AnswerLikelihoods, told: PairLossParameters) -> torch.Tensor:
    summed = good.ratios - bad.ratios
    difference = summed if told.ipo_sums else _mean_difference(good, bad)
    return (difference - 1 / (2 * told.beta)).square()


def _dpo_norm(
    good: AnswerLikelihoods, bad: AnswerLikelihoods, told: PairLossParameters
) -> torch.Tensor:
    return -log_sigmoid(told.beta * _mean_difference(good, bad))


def _simpo(
    good: AnswerLikelihoods, bad: AnswerLikelihoods, told: PairLossParameters
) -> torch.Tensor:
    return -log_sigmoid(told.beta * (good.means - bad.means) - told.gamma)


def _cpo(good: AnswerLikelihoods, bad: AnswerLikelihoods, told: PairLossParameters) -> torch.Tensor:
    return -log_sigmoid(told.beta * (good.sums - bad.sums))


def log_odds(mean: torch.Tensor) -> torch.Tensor:
    """Return log p/(1 - p) of p = exp(mean), finite up to p = 1.

    log(1 - exp x) is log(-expm1 x) for x near 0 and log1p(-exp x) elsewhere (Mächler, 2012).
    """
    import torch

    below = mean.clamp(max=-1e-7)
    near = torch.log(-torch.expm1(below.clamp(min=-math.log(2))))
    far = torch.log1p(-torch.exp(below.clamp(max=-math.log(2))))
    return mean - torch.where(below > -math.log(2), near, far)


def _orpo(
    good: AnswerLikelihoods, bad: AnswerLikelihoods, told: PairLossParameters
) -> torch.Tensor:
    return -told.beta * log_sigmoid(log_odds(good.means) - log_odds(bad.means))


PAIR_LOSSES: dict[str, PairLoss] = {
    "dpo": _dpo,
    "cdpo": _cdpo,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "dpo-norm": _dpo_norm,
    "ld-dpo": _dpo,  # with length-weighted sums
    "rpo": _dpo,  # plus the preferred answer's negative log-likelihood
    "simpo": _simpo,
    "cpo": _cpo,
    "orpo": _orpo,
}


def kto(
    answered: AnswerLikelihoods,
    good: torch.Tensor,
    baseline: torch.Tensor,
    beta: float,
    weights: tuple[float, float],
) -> torch.Tensor:
    """Return the KTO loss of each answer.

    `good` and the detached `baseline` z are `(answers,)`; `weights` are λ of desirable and other
    answers.
    """
    import torch

    above = beta * (answered.ratios - baseline)
    desirable, undesirable = weights
    return torch.where(
        good,
        desirable * (1 - torch.sigmoid(above)),
        undesirable * (1 - torch.sigmoid(-above)),
    )


def bradley_terry(
    good: torch.Tensor, bad: torch.Tensor, margins: torch.Tensor, center: float
) -> torch.Tensor:
    """Return the reward loss of each pair, `(pairs,)`."""
    return center * (good + bad).square() - log_sigmoid(good - bad - margins)
