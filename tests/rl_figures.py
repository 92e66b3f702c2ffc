"""Expected policy losses for fixed completions of a tiny Llama.

Each completion is a batch of its own, unpadded and in float64; formulas are those of the papers, in
loops. `scripts/against_trl_rl.py` of commit 29ae4f80 compares TRL's trainers with the same figures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from preference_figures import EOS, build_base, build_model, gradient_norms

GROUP = 4
COMPLETIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Q: 2 + 2?\nA:", (" 4", " four, I think", " 5", " 22 or so")),
    ("Name a color.\n", ("Blue.", "Red, since", "Blue.", "Green is what I like.")),
)
"""Prompts with a group of completions each."""
TRUNCATED = (1, 7)
"""Indices of truncated completions, without EOS."""
REWARDS = [1.0, 0.2, 0.0, 0.5, 0.9, 0.1, 0.9, 0.4]
LENGTH = 24
"""Maximum completion length."""
NOISE = 0.3
"""Standard deviation of the difference between policy and old policy, in nats a token."""

CLIP: dict[str, tuple[float, float]] = {
    "dapo": (0.2, 0.28),
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "bnpo": (0.2, 0.2),
    "rloo": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (math.nan, 1.2),
    "reinforce++": (0.2, 0.2),
}
"""Loss → epsilon and epsilon_high; cispo's cap is below its default, so that it has an effect."""


@dataclass(frozen=True)
class Case:
    """A loss and its settings; `masked` excludes truncated completions."""

    loss: str
    beta: float = 0.0
    corrected: bool = False
    masked: bool = False
    off_policy: bool = True

    def __str__(self) -> str:
        labels = {
            f"beta {self.beta:g}": self.beta,
            "corrected": self.corrected,
            "masked": self.masked,
            "first step": not self.off_policy,
        }
        return ", ".join([self.loss, *(name for name, is_on in labels.items() if is_on)])


CASES = [
    Case(loss, *settings)
    for loss in CLIP
    for settings in ((), (0.1,), (0.1, True), (0.0, False, True), (0.0, False, False, False))
    if not (loss == "rloo" and settings[1:2] == (True,))
]


def rows() -> Iterator[tuple[list[int], list[int]]]:
    """Yield token ids of prompt and completion; each byte is a token."""
    number = 0
    for prompt, completions in COMPLETIONS:
        for text in completions:
            end = [] if number in TRUNCATED else [EOS]
            yield list(prompt.encode()), [*text.encode(), *end]
            number += 1


def log_probabilities(model: Any) -> list[torch.Tensor]:
    """Return the log-probability of each token of each completion."""
    values = []
    for prompt, completion in rows():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1)
        values.append(log_probs[torch.arange(len(completion)), torch.tensor(completion)])
    return values


@cache
def reference_log_probabilities() -> list[torch.Tensor]:
    """Return the log-probabilities of the base model, without its adapter."""
    with torch.no_grad():
        return log_probabilities(build_base().double())


def old_log_probabilities(policy: Sequence[torch.Tensor], case: Case) -> list[torch.Tensor]:
    """Return log-probabilities of the old policy: those of `policy` with fixed noise."""
    rng = np.random.RandomState(3)
    noise = [torch.tensor(rng.standard_normal(len(log_probs)) * NOISE) for log_probs in policy]
    size = 1.0 if case.off_policy else 0.0
    return [
        log_probs.detach() + size * noise_values
        for log_probs, noise_values in zip(policy, noise, strict=True)
    ]


def is_active(index: int, case: Case) -> bool:
    """Return whether the loss includes a completion."""
    return not (case.masked and index in TRUNCATED)


def expected_advantages(
    case: Case, old: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]
) -> list[float]:
    """Return the advantages of all completions."""
    rewards = list(REWARDS)
    if case.loss == "rloo" and case.beta:
        rewards = [
            reward - case.beta * float((old_values - reference_values).sum())
            for reward, old_values, reference_values in zip(rewards, old, reference, strict=True)
        ]
    if case.loss == "reinforce++":
        lengths = [len(log_probs) if is_active(i, case) else 0 for i, log_probs in enumerate(old)]
        tokens = [r for r, count in zip(rewards, lengths, strict=True) for _ in range(count)]
        mean, deviation = statistics.fmean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
        return [(reward - mean) / deviation for reward in rewards]
    values = []
    for begin in range(0, len(rewards), GROUP):
        group = rewards[begin : begin + GROUP]
        for position, reward in enumerate(group):
            others = group[:position] + group[position + 1 :]
            centered = reward - statistics.fmean(group)
            if case.loss == "rloo":
                values.append(reward - statistics.fmean(others))
            elif case.loss == "dr_grpo":
                values.append(centered)
            else:
                values.append(centered / (statistics.stdev(group) + 1e-4))
    return values


def compute_full_loss(case: Case, model: Any) -> torch.Tensor:
    """Return the loss of all completions as one optimizer step."""
    policy, reference = log_probabilities(model), reference_log_probabilities()
    old = old_log_probabilities(policy, case)
    advantages = expected_advantages(case, old, reference)
    active = [is_active(i, case) for i in range(len(policy))]
    tokens = sum(len(log_probs) for i, log_probs in enumerate(policy) if active[i])
    low, high = CLIP[case.loss]
    total = torch.zeros((), dtype=torch.float64)
    for i, log_probs in enumerate(policy):
        if not active[i]:
            continue
        ratio = torch.exp(log_probs - old[i])
        if case.loss == "gspo":
            ratio = torch.exp((log_probs - old[i]).mean()).expand(len(log_probs))
        if case.loss == "rloo":
            ratio = torch.exp((log_probs - old[i]).sum()).expand(len(log_probs))
        completion_loss = torch.zeros((), dtype=torch.float64)
        for t in range(len(log_probs)):
            if case.loss == "cispo":
                token = -min(ratio[t].item(), high) * advantages[i] * log_probs[t]
            else:
                clipped = ratio[t].clamp(1 - low, 1 + high)
                token = -torch.minimum(ratio[t] * advantages[i], clipped * advantages[i])
            if case.beta and case.loss != "rloo":
                difference = reference[i][t] - log_probs[t]
                kl = torch.exp(difference) - difference - 1
                token = token + case.beta * kl * (ratio[t] if case.corrected else 1.0)
            completion_loss = completion_loss + token
        if case.loss in ("grpo", "gspo", "rloo"):
            total = total + completion_loss / len(log_probs) / len(policy)
        elif case.loss == "dr_grpo":
            total = total + completion_loss / LENGTH / len(policy)
        else:
            total = total + completion_loss / tokens
    return total


def loss_and_norms(case: Case) -> tuple[float, float, float]:
    """Return the loss and its gradient norms over all A and all B of the LoRA."""
    model = build_model().double()
    loss = compute_full_loss(case, model)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), *gradient_norms(model)
