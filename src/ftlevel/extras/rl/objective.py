"""Policy objective, and the meter of rewards on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ftlevel.extras.rl.config import RlConfig
from ftlevel.objectives import Meter, TokenLogps, TokenObjective, TrainingLoss
from ftlevel.tasks.losses import Tokens, TokenTargets, mean_or_nan

if TYPE_CHECKING:
    import torch

    from ftlevel.extras.rl.losses import PolicyLoss, PolicyLossParameters

Watch = Callable[["PolicyLoss", Any, Any], None]
"""Receives the loss of a micro-batch, its detached log-probabilities and its signals."""

CORRECT = 1.0
"""Minimum of the first reward at which pass@k counts a completion as correct."""


def ignore(loss: PolicyLoss, log_probs: torch.Tensor, signals: torch.Tensor) -> None:
    """Do nothing with the loss and its statistics; the default `PolicyGradient.watch`."""


def loss_parameters(config: RlConfig) -> PolicyLossParameters:
    """Returns the parameters of the policy loss that `config` sets."""
    from ftlevel.extras.rl.losses import PolicyLossParameters

    (epsilon, high), length = config.clip, config.max_completion_length
    corrects_kl = config.use_bias_correction_kl
    return PolicyLossParameters(config.loss, epsilon or 0.0, high, config.beta, length, corrects_kl)


@dataclass(frozen=True)
class PolicyGradient(TokenTargets, TokenObjective):
    """Objective of policy losses; `watch` is called with each micro-batch's `PolicyLoss`.

    A batch contains `signals` `(targets, n)`. They include a weight per target that already
    normalizes the loss, so `training_count` is 1. `temperature` divides logits. `teacher` is the
    name of the model to distill from; None if rewards are used.
    """

    temperature: float = 1.0
    samples: ClassVar[bool] = True
    evaluates_first: ClassVar[bool] = True
    shard_limitation: ClassVar[str] = (
        "each process samples its own completions with all weights, and would hold a part of them"
    )

    config: RlConfig = field(default_factory=RlConfig)
    teacher: str | None = None
    watch: Watch = field(default=ignore, compare=False)

    @property
    def of_tokens(self) -> TokenObjective:
        return Tokens("perplexity", shifted=True)

    def training_count(self, labels: torch.Tensor, loss: TrainingLoss) -> torch.Tensor:
        """Returns 1: the signals' weights already divide by the targets of the whole step."""
        import torch

        return torch.ones((), device=labels.device)

    def step_count(self, counts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the first count: the weights are those of the whole step already."""
        return counts[0]

    def likelihood_loss(self, batch: Mapping[str, Any], compute: TokenLogps) -> torch.Tensor | None:
        """Returns `policy_sum` of the sampled tokens in a batch; None without `signals`."""
        if "signals" not in batch:
            return None
        log_probs, owners = compute(self.temperature)
        return self.policy_sum(log_probs, owners, batch["signals"])

    def policy_sum(
        self, log_probs: torch.Tensor, owners: torch.Tensor, signals: torch.Tensor
    ) -> torch.Tensor:
        """Returns the policy loss (a scalar); `signals` `(targets, 5)` has a `Signal` per target.

        `owners` has the index of each target's completion in the batch. With a teacher, the
        advantage of a token is log π_teacher − log π_old. This gives an unbiased estimate of the
        gradient of the reverse KL per token, as in GKD with λ = 1 (2306.13649) and in Thinking
        Machines' On-Policy Distillation (2025).
        """
        import torch

        from ftlevel.extras.rl.losses import policy_loss

        advantages, weights, old, reference, _ = signals.unbind(1)
        old = torch.where(old.isnan(), log_probs.detach(), old)
        if self.teacher:  # stand-ins have no log-probability of the teacher
            advantages = torch.where(reference.isnan(), advantages, reference - old)
        reference = torch.where(reference.isnan(), log_probs.detach(), reference)
        loss = policy_loss(
            loss_parameters(self.config),
            log_probs,
            old,
            owners,
            advantages,
            weights,
            reference if self.config.beta or self.teacher else None,
        )
        self.watch(loss, log_probs.detach(), signals)
        return loss.total

    def micro_batch_tokens(self, meta: Any, rows: Sequence[Any], device: str, workers: int) -> int:
        """Returns the tokens of a group of completions for each worker; 0 on a GPU.

        Of completions, at most `MAX_CPU_TOKENS` count. There are fewer groups if they do not fit
        into memory. SmolLM2 needs 0.98 MB per token in float32; the sizes of its linear layers give
        1.15.
        """
        from ftlevel.data.encoding.store import row_lengths
        from ftlevel.fast.plan import GROUP_DIVISOR, MAX_CPU_TOKENS
        from ftlevel.models.hardware import device_memory
        from ftlevel.models.module_tree import get_blocks, linear_size

        if device != "cpu":
            return 0
        completion = self.config.max_completion_length
        prompt = max(0, int(row_lengths(rows).max()) - completion)
        group = prompt + min(self.config.num_generations * completion, MAX_CPU_TOKENS)
        layers = [layer for block in get_blocks(meta) for layer in block.modules()]
        width = sum(sum(size[1:]) for size in map(linear_size, layers) if size is not None)
        available_tokens = device_memory("cpu") // GROUP_DIVISOR // (4 * max(width, 1))
        return group * min(workers, available_tokens // group)

    @property
    def metrics(self) -> tuple[str, ...]:
        return RewardMeter.names(self.config)

    def meter(self) -> Meter:
        return RewardMeter(self.config)

    def get_warnings(
        self, metrics: Mapping[str, float], before: Mapping[str, float] | None = None
    ) -> list[str]:
        share = metrics.get("truncated", 0.0)
        if share <= TRUNCATED_RATIO:
            return []
        advice = "" if self.teacher else ", or reward short completions"
        return [
            f"{share:.0%} of the completions of held-out prompts are cut at "
            f"{self.config.max_completion_length} tokens. Raise --max-completion-length{advice}."
        ]


TRUNCATED_RATIO = 0.5


class RewardMeter:
    """Meter of prompts with equally many completions: mean reward, pass@k and lengths."""

    def __init__(self, config: RlConfig) -> None:
        self._config = config
        self._seen: list[np.ndarray] = []  # (completions, 3 + functions) per prompt
        self._texts: list[str] = []

    @staticmethod
    def names(config: RlConfig) -> tuple[str, ...]:
        """Returns the names of the metrics; `reward` is the mean over all completions."""
        functions = [f"reward_{spec}" for spec in config.reward_names]
        own = functions if len(functions) > 1 else []
        passes = [f"pass@{k}" for k in pass_counts(config.num_generations) if functions]
        return ("reward", *own, *passes, "length", "truncated")

    def update(self, logits: Any, labels: Any, rows: Sequence[Any]) -> None:
        """Add a prompt: `logits` are `values_of` its completions, `labels` their texts."""
        self._seen.append(np.asarray(logits, dtype=np.float64))
        self._texts += labels

    def merge(self, other: RewardMeter) -> None:
        self._seen += other._seen
        self._texts += other._texts

    def pool(self, meters: Sequence[RewardMeter]) -> RewardMeter:
        pooled = RewardMeter(self._config)
        for meter in meters:
            pooled.merge(meter)
        return pooled

    def compute(self, loss: float) -> dict[str, float]:
        """Compute the metrics: each is averaged over a prompt's completions, then over prompts."""

        def mean_of(column: int) -> float:
            values = [part[~np.isnan(part[:, column]), column] for part in self._seen]
            return mean_or_nan([own.mean() for own in values if len(own)])

        found, functions = {"reward": mean_of(0)}, self._config.reward_names
        if len(functions) > 1:
            found |= {f"reward_{name}": mean_of(3 + at) for at, name in enumerate(functions)}
        for k in pass_counts(self._config.num_generations):
            passed = [
                pass_at_k(len(part), int((part[:, 3] >= CORRECT).sum()), k)
                for part in self._seen
                if part.shape[1] > 3 and not np.isnan(part[:, 3]).all()
            ]
            if passed:
                found[f"pass@{k}"] = mean_or_nan(passed)
        found["length"] = mean_or_nan([part[:, 1].mean() for part in self._seen])
        found["truncated"] = mean_or_nan([1 - part[:, 2].mean() for part in self._seen])
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        rewards = [round(float(value), 4) for part in self._seen for value in part[:, 0]]
        return {"predicted": self._texts[0] if self._texts else "", "rewards": rewards}


def pass_counts(completions: int) -> list[int]:
    """Returns the values of k for pass@k: 1 and half the number of completions."""
    return sorted({1, max(1, completions // 2)})


def pass_at_k(completions: int, correct: int, k: int) -> float:
    """Returns pass@k, 1 − C(n − c, k) / C(n, k): n completions, c of them correct (2107.03374)."""
    return 1 - math.comb(completions - correct, k) / math.comb(completions, k)
