"""Preference losses, their objective, and its metrics.

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
another row's answer y', clamped to at least 0 and detached. Accuracies are
over all pairs, independent of batching; a tie counts as wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftlevel.extras.preference.config import PreferenceConfig
from ftlevel.objectives import IGNORED, Meter, TokenLogps, TokenObjective, TrainingLoss
from ftlevel.tasks.losses import Tokens, TokenTargets, mean_or_nan

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SequenceLogps:
    """Log-likelihoods of the answers of a batch; float32 tensors `(answers,)`.

    `sums` are by the policy, `reference` by the reference model (0 without one); `counts` are the
    numbers of tokens.
    """

    sums: Tensor
    counts: Tensor
    reference: Tensor

    @property
    def ratios(self) -> Tensor:
        """Log-likelihood ratios r of policy and reference, `sums - reference`."""
        return self.sums - self.reference

    def alternate(self, first: int) -> SequenceLogps:
        """Returns every second answer from `first` on: the preferred (0) or the rejected (1)."""
        index = slice(first, None, 2)
        return SequenceLogps(self.sums[index], self.counts[index], self.reference[index])

    @property
    def means(self) -> Tensor:
        """Mean log-likelihood per token."""
        return self.sums / self.counts


PairLoss = Callable[[SequenceLogps, SequenceLogps, "Preferences"], "Tensor"]
"""(preferred answers, rejected answers, objective) -> loss of each pair."""


def log_sigmoid(value: Tensor) -> Tensor:
    """Returns log σ(`value`), where σ is the sigmoid."""
    from torch.nn import functional

    return functional.logsigmoid(value)


def _reward(chosen: SequenceLogps, rejected: SequenceLogps, p: Preferences) -> Tensor:
    """Returns β (r+ - r-), where r is an answer's log-ratio of policy and reference."""
    return p.beta * (chosen.ratios - rejected.ratios)


def _mean_difference(chosen: SequenceLogps, rejected: SequenceLogps) -> Tensor:
    """Returns r+/n+ - r-/n-, the difference of the answers' log-ratios per token."""
    return chosen.ratios / chosen.counts - rejected.ratios / rejected.counts


def _cdpo(chosen: SequenceLogps, rejected: SequenceLogps, p: Preferences) -> Tensor:
    reward = _reward(chosen, rejected, p)
    swapped = p.smoothing * log_sigmoid(-reward)
    return -(1 - p.smoothing) * log_sigmoid(reward) - swapped


def _robust(chosen: SequenceLogps, rejected: SequenceLogps, p: Preferences) -> Tensor:
    reward = _reward(chosen, rejected, p)
    swapped = p.smoothing * log_sigmoid(-reward)
    return (swapped - (1 - p.smoothing) * log_sigmoid(reward)) / (1 - 2 * p.smoothing)


def _ipo(chosen: SequenceLogps, rejected: SequenceLogps, p: Preferences) -> Tensor:
    difference = (
        chosen.ratios - rejected.ratios
        if p.config.ipo_ratios == "sum"
        else _mean_difference(chosen, rejected)
    )
    return (difference - 1 / (2 * p.beta)).square()


def log_odds(mean: Tensor) -> Tensor:
    """Returns log p/(1 - p) of p = exp(mean), finite up to p = 1.

    log(1 - exp x) is log(-expm1 x) for x near 0 and log1p(-exp x) elsewhere (Mächler, 2012).
    """
    import torch

    below = mean.clamp(max=-1e-7)
    log_expm1 = torch.log(-torch.expm1(below.clamp(min=-math.log(2))))
    log1p_exp = torch.log1p(-torch.exp(below.clamp(max=-math.log(2))))
    return mean - torch.where(below > -math.log(2), log_expm1, log1p_exp)


PAIR_LOSSES: dict[str, PairLoss] = {
    "dpo": lambda chosen, rejected, p: -log_sigmoid(_reward(chosen, rejected, p)),
    "cdpo": _cdpo,
    "robust": _robust,
    "hinge": lambda chosen, rejected, p: (1 - _reward(chosen, rejected, p)).relu(),
    "ipo": _ipo,
    "dpo-norm": lambda chosen, rejected, p: (
        -log_sigmoid(p.beta * _mean_difference(chosen, rejected))
    ),
    "simpo": lambda chosen, rejected, p: (
        -log_sigmoid(p.beta * (chosen.means - rejected.means) - p.config.margin)
    ),
    "cpo": lambda chosen, rejected, p: -log_sigmoid(p.beta * (chosen.sums - rejected.sums)),
    "orpo": lambda chosen, rejected, p: (
        -p.beta * log_sigmoid(log_odds(chosen.means) - log_odds(rejected.means))
    ),
}
PAIR_LOSSES["ld-dpo"] = PAIR_LOSSES["dpo"]  # with length-weighted sums
PAIR_LOSSES["rpo"] = PAIR_LOSSES["dpo"]  # plus the preferred answer's negative log-likelihood


def kto(
    answered: SequenceLogps,
    labels: Tensor,
    baseline: Tensor,
    beta: float,
    weights: tuple[float, float],
) -> Tensor:
    """Returns the KTO loss of each answer.

    `labels` (whether desirable) and `baseline` (mean reward of mismatched pairs, detached) are
    `(answers,)`; `weights` are those of desirable and undesirable answers.
    """
    import torch

    above = beta * (answered.ratios - baseline)
    desirable, undesirable = weights
    return torch.where(
        labels, desirable * (1 - torch.sigmoid(above)), undesirable * (1 - torch.sigmoid(-above))
    )


def bradley_terry(chosen: Tensor, rejected: Tensor, margins: Tensor, center: float) -> Tensor:
    """Returns a reward model's loss of each pair, `(pairs,)`; (s+ + s-)² has weight `center`."""
    return center * (chosen + rejected).square() - log_sigmoid(chosen - rejected - margins)


_COLUMNS = 6
"""Columns per answer: label, log-likelihood, tokens, reference log-likelihood, reward, baseline."""
_PAIR, _JUDGED = ("chosen", "rejected"), ("desirable", "undesirable")


def metric_names(*, paired: bool, referenced: bool) -> tuple[str, ...]:
    """Returns the metric names for pairs or single answers, with or without a reference."""
    groups = _PAIR if paired else _JUDGED
    kinds = ("logp", "length", *(("reward", "ref_logp") if referenced else ()))
    names = [f"{kind}_{group}" for kind in kinds for group in groups]
    names += ["logp_accuracy", "logp_mean_accuracy", "length_accuracy"] if paired else []
    names += ["reward_margin"] if referenced else []
    names += [("reward_accuracy" if paired else "kl")] if referenced else []
    return tuple(names)


class PreferenceMeter:
    """Meter of preference losses: log-likelihoods, lengths and implicit rewards of answers."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective
        self._seen: list[np.ndarray] = []

    def update(self, logits: Tensor, labels: Tensor, rows: Sequence[Any]) -> None:
        """Add answers: (log-likelihood, tokens) and (label, reference log-likelihood, baseline)."""
        import torch

        rewards = self._objective.rewards(logits, labels)
        values = [labels[:, 0], logits[:, 0], logits[:, 1], labels[:, 1], rewards, labels[:, 2]]
        self._seen.append(torch.stack(values, dim=1).cpu().double().numpy())

    def merge(self, other: PreferenceMeter) -> None:
        self._seen += other._seen

    def pool(self, meters: Sequence[PreferenceMeter]) -> PreferenceMeter:
        pooled = PreferenceMeter(self._objective)
        pooled._seen = [np.array(part) for meter in meters for part in meter._seen]
        for part in pooled._seen:
            part[:, 5] = math.nan  # kl is a mean over other answers, not over these
        return pooled

    def compute(self, loss: float) -> dict[str, float]:
        seen = np.concatenate(self._seen) if self._seen else np.zeros((0, _COLUMNS))
        chosen = seen[:, 0] > 0
        names = _PAIR if self._objective.is_paired else _JUDGED
        groups = dict(zip(names, (seen[chosen], seen[~chosen]), strict=True))
        metrics: dict[str, float] = {}
        for name, group in groups.items():
            metrics[f"logp_{name}"] = mean_or_nan(group[:, 1])
            metrics[f"length_{name}"] = mean_or_nan(group[:, 2])
            if self._objective.needs_reference:
                metrics[f"reward_{name}"] = mean_or_nan(group[:, 4])
                metrics[f"ref_logp_{name}"] = mean_or_nan(group[:, 3])
        if self._objective.is_paired:
            metrics |= self._compare(*groups.values())
        elif self._objective.needs_reference:
            first, second = (mean_or_nan(group[:, 4]) for group in groups.values())
            metrics["reward_margin"] = first - second
            metrics["kl"] = mean_or_nan(seen[:, 5])
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def _compare(self, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
        length = (chosen[:, 2] > rejected[:, 2]) + 0.5 * (chosen[:, 2] == rejected[:, 2])
        metrics = {
            "logp_accuracy": mean_or_nan(chosen[:, 1] > rejected[:, 1]),
            "logp_mean_accuracy": mean_or_nan(
                chosen[:, 1] / chosen[:, 2] > rejected[:, 1] / rejected[:, 2]
            ),
            "length_accuracy": mean_or_nan(length),
        }
        if self._objective.needs_reference:
            metrics["reward_accuracy"] = mean_or_nan(chosen[:, 4] > rejected[:, 4])
            metrics["reward_margin"] = mean_or_nan(chosen[:, 4] - rejected[:, 4])
        return metrics

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns the metrics of the only example added: rewards, log-likelihoods, lengths."""
        return {name: round(value, 4) for name, value in self.compute(math.nan).items()}


WITH_SFT = ("rpo", "cpo", "orpo")
"""Losses that include the preferred answer's negative log-likelihood."""


@dataclass(frozen=True)
class Preferences(TokenTargets, TokenObjective):
    """Objective of preference losses: of pairs, preferred answer first, or labeled answers.

    A batch contains `preference_labels` `(answers, 3)`: 1.0 if preferred or desirable, reference
    log-probability, margin. The answers of a row are consecutive in one batch.

    Attributes:
        needs_baseline: whether the loss subtracts, from rewards, the mean reward of mismatched
            prompt-answer pairs (KTO), which must be known before the step.
        smoothing: ε, the assumed share of swapped pairs.
        shifted: as in `Tokens`.
    """

    needs_reference: bool = False
    needs_baseline: bool = False
    shard_limitation: ClassVar[str] = "the reference cache is per process"
    has_own_smoothing: ClassVar[bool] = True
    config: PreferenceConfig = field(default_factory=PreferenceConfig)
    smoothing: float = 0.0
    shifted: bool = True

    @property
    def is_paired(self) -> bool:
        return self.config.loss_properties.paired

    @property
    def beta(self) -> float:
        return self.config.effective_beta

    @property
    def of_tokens(self) -> TokenObjective:
        return Tokens("perplexity", self.feeds_labels, self.shifted)

    def likelihood_loss(self, batch: Mapping[str, Any], compute: TokenLogps) -> Tensor | None:
        """Returns `preference_sum` of the answers in a batch."""
        answers = self.answers(*compute(1.0), len(batch["labels"]))
        return self.preference_sum(answers, batch["preference_labels"], training=True)

    def answers(self, log_probs: Tensor, owners: Tensor, count: int) -> Tensor:
        """Returns `(count, 2)`: log-likelihood (weighted for ld-dpo) and number of tokens.

        `log_probs` are float32 `(targets,)`; `owners` `(targets,)` is the answer of each.
        """
        import torch

        zeros = torch.zeros(count, device=log_probs.device)
        counts = zeros.index_add(0, owners, torch.ones_like(log_probs))
        if self.config.loss == "ld-dpo" and count > 1:
            starts = counts.cumsum(0) - counts
            position = torch.arange(len(owners), device=log_probs.device) - starts[owners]
            shorter = counts.view(-1, 2).amin(1).repeat_interleave(2)
            log_probs = torch.where(
                position < shorter[owners], log_probs, self.config.ld_alpha * log_probs
            )
        return torch.stack([zeros.index_add(0, owners, log_probs), counts], dim=1)

    def preference_sum(
        self, answers: Tensor, preference_labels: Tensor, *, training: bool
    ) -> Tensor:
        """Returns the loss summed over pairs or answers (a scalar), from the result of `answers`.

        In training with `nll_mean: token`, returns `(2,)`: the pair loss and the token loss of the
        preferred answers; the two losses have different divisors.
        """
        import torch

        config = self.config
        answered = SequenceLogps(answers[:, 0], answers[:, 1], preference_labels[:, 1])
        if not self.is_paired:
            weights = config.desirable_weight, config.undesirable_weight
            is_chosen = preference_labels[:, 0] > 0
            return kto(answered, is_chosen, preference_labels[:, 2], self.beta, weights).sum()
        preferred, rejected = answered.alternate(0), answered.alternate(1)
        of_pairs = PAIR_LOSSES[config.loss or "dpo"](preferred, rejected, self).sum()
        if config.loss not in WITH_SFT:
            return of_pairs
        weight = 1.0 if config.loss == "orpo" else config.sft_weight
        if training and config.nll_mean == "token":
            return torch.stack([of_pairs, -weight * preferred.sums.sum()])
        return of_pairs - weight * preferred.means.sum()

    def count(self, labels: Tensor) -> Tensor:
        return labels.new_full((), labels.shape[0] // 2 if self.is_paired else labels.shape[0])

    def training_count(self, labels: Tensor, loss: TrainingLoss) -> Tensor:
        """Returns the number of pairs; with `nll_mean: token`, also of preferred tokens, `(2,)`."""
        import torch

        count = self.count(labels)
        if self.config.loss not in WITH_SFT or self.config.nll_mean == "answer":
            return count
        preferred = labels[::2, 1:] if self.shifted else labels[::2]
        return torch.stack([count, preferred.ne(IGNORED).sum()])

    @property
    def metrics(self) -> tuple[str, ...]:
        return metric_names(paired=self.is_paired, referenced=self.needs_reference)

    @property
    def first_loss(self) -> float | None:
        """Loss of a policy that equals the reference (log-ratios 0); None if it depends on data."""
        if not self.needs_reference or self.config.other_reference is not None:
            return None
        losses = {
            "hinge": 1.0,
            "ipo": 1 / (4 * self.beta**2),
            **dict.fromkeys(("dpo", "cdpo", "robust", "dpo-norm", "ld-dpo"), math.log(2)),
        }
        return losses.get(self.config.loss or "dpo")

    def get_warnings(
        self, metrics: Mapping[str, float], before: Mapping[str, float] | None = None
    ) -> list[str]:
        """Returns warnings of length bias, and of answers less likely than before training."""
        warnings = []
        names = _PAIR if self.is_paired else _JUDGED
        start, prefix = (metrics, "ref_logp") if self.needs_reference else (before or {}, "logp")
        changes = [
            metrics[f"logp_{name}"] - start[f"{prefix}_{name}"]
            if f"logp_{name}" in metrics and f"{prefix}_{name}" in start
            else 0.0
            for name in names
        ]
        if changes[0] < 0:
            both = "both kinds of answers" if changes[1] < 0 else f"the {names[0]} answers"
            # Without a reference, beta does not limit the change of log-probabilities.
            advice = (
                "a lower rate, a higher --beta or" if self.needs_reference else "a lower rate or"
            )
            than = "with the reference" if self.config.other_reference else "before training"
            warnings.append(
                f"{both} are less likely than {than} ({names[0]} {changes[0]:+.2f} nats, "
                f"{names[1]} {changes[1]:+.2f}): the model may generate neither (likelihood "
                f"displacement). Inspect samples; {advice} --loss rpo limits it."
            )
        right, length = metrics.get("reward_accuracy"), metrics.get("length_accuracy", 0.0)
        if right is not None and 0.5 < right <= length:
            warnings.append(
                f"reward_accuracy {right:.2f} is no better than preferring the longer answer "
                f"({length:.2f})."
            )
        return warnings

    def meter(self) -> Meter:
        return PreferenceMeter(self)

    def rewards(self, answers: Tensor, preference_labels: Tensor) -> Tensor:
        """Returns implicit rewards `(answers,)`: β times log-ratio, per token for some losses."""
        answered = SequenceLogps(answers[:, 0], answers[:, 1], preference_labels[:, 1])
        by_token = self.config.loss in ("simpo", "orpo", "dpo-norm") or (
            self.config.loss == "ipo" and self.config.ipo_ratios == "mean"
        )
        ratios = answered.ratios
        return self.beta * (ratios / answered.counts if by_token else ratios)


def create_preferences(config: PreferenceConfig, smoothing: float, kind: str) -> Preferences:
    """Create the preference objective of a model of `kind`, decoder or encoder-decoder."""
    headline = "reward_accuracy" if config.uses_reference else "logp_mean_accuracy"
    if not config.loss_properties.paired:
        headline = "reward_margin" if config.uses_reference else "logp_desirable"
    return Preferences(
        headline,
        kind == "encoder-decoder",
        needs_reference=config.uses_reference,
        needs_baseline=config.loss == "kto",
        config=config,
        smoothing=smoothing,
        shifted=kind == "decoder",
    )
