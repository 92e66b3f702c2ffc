"""Compute tests/preference_figures.json: preference losses by a plain float64 script.

    python tests/make_preference_figures.py > tests/preference_figures.json

Weights and rows are those of `tests/preference_figures.py`; no code of ftlevel computes here. Each
answer is a batch of its own; formulas are those of the papers, pair by pair; gradients are those of
autograd. All is in float64 except norm layers, which transformers computes in float32, so values
have about seven correct digits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import preference_figures as given

BETAS = (0.1, 0.5)
GAMMA, EPSILON, ALPHA, UNDESIRABLE = 1.0, 0.1, 0.5, 1.33


@dataclass(frozen=True)
class Answer:
    """Log-probabilities of the tokens of an answer, with its EOS."""

    policy: torch.Tensor
    reference: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.policy)

    @property
    def total(self) -> torch.Tensor:
        """Log-probability of the answer."""
        return self.policy.sum()

    @property
    def ratio(self) -> torch.Tensor:
        """Log-ratio of policy and reference."""
        return self.total - self.reference.sum()

    @property
    def odds(self) -> torch.Tensor:
        """Log-odds of the mean token probability."""
        mean = self.total / self.tokens
        return mean - torch.log1p(-mean.exp())

    def length_weighted_ratio(self, shorter: int) -> torch.Tensor:
        """Return the log-ratio with weight ALPHA for tokens beyond `shorter`."""
        log_ratios = self.policy - self.reference
        return log_ratios[:shorter].sum() + ALPHA * log_ratios[shorter:].sum()


Pairs = list[tuple[Answer, Answer]]


def log_likelihoods(model: Any, prompt: str, answer: str) -> torch.Tensor:
    """Return the log-probability of each token of an answer and its EOS, given its prompt."""
    prompt_ids, answer_ids = list(prompt.encode()), [*answer.encode(), given.EOS]
    scores = model(torch.tensor([prompt_ids + answer_ids])).logits[0].log_softmax(-1)
    return torch.stack(
        [scores[len(prompt_ids) - 1 + i, token] for i, token in enumerate(answer_ids)]
    )


def create_answer(model: Any, prompt: str, answer: str) -> Answer:
    """Return log-probabilities of an answer under policy and reference (the base)."""
    with torch.no_grad(), model.disable_adapter():
        reference = log_likelihoods(model, prompt, answer)
    return Answer(log_likelihoods(model, prompt, answer), reference)


def sigma(value: torch.Tensor) -> torch.Tensor:
    """Return 1 / (1 + exp(-value))."""
    return 1 / (1 + (-value).exp())


def nll(chosen: Answer) -> torch.Tensor:
    """Return the mean negative log-likelihood of an answer's tokens."""
    return -chosen.total / chosen.tokens


def pair_losses(beta: float) -> dict[str, Callable[[Answer, Answer], torch.Tensor]]:
    """Return loss name → function of the preferred and the rejected answer."""

    def ratio_difference(chosen: Answer, rejected: Answer) -> torch.Tensor:
        return chosen.ratio - rejected.ratio

    def mean_ratio_difference(chosen: Answer, rejected: Answer) -> torch.Tensor:
        return chosen.ratio / chosen.tokens - rejected.ratio / rejected.tokens

    def dpo(chosen: Answer, rejected: Answer) -> torch.Tensor:
        return -sigma(beta * ratio_difference(chosen, rejected)).log()

    def dpo_swapped(chosen: Answer, rejected: Answer) -> torch.Tensor:
        return -sigma(-beta * ratio_difference(chosen, rejected)).log()

    def ld(chosen: Answer, rejected: Answer) -> torch.Tensor:
        shorter = min(chosen.tokens, rejected.tokens)
        return -sigma(
            beta * (chosen.length_weighted_ratio(shorter) - rejected.length_weighted_ratio(shorter))
        ).log()

    def simpo(chosen: Answer, rejected: Answer) -> torch.Tensor:
        difference = chosen.total / chosen.tokens - rejected.total / rejected.tokens
        return -sigma(beta * difference - GAMMA).log()

    return {
        "dpo": dpo,
        "cdpo": lambda g, b: (1 - EPSILON) * dpo(g, b) + EPSILON * dpo_swapped(g, b),
        "robust": lambda g, b: (
            ((1 - EPSILON) * dpo(g, b) - EPSILON * dpo_swapped(g, b)) / (1 - 2 * EPSILON)
        ),
        "hinge": lambda g, b: (1 - beta * ratio_difference(g, b)).clamp(min=0),
        "ipo-sum": lambda g, b: (ratio_difference(g, b) - 1 / (2 * beta)) ** 2,
        "ipo": lambda g, b: (mean_ratio_difference(g, b) - 1 / (2 * beta)) ** 2,
        "dpo-norm": lambda g, b: -sigma(beta * mean_ratio_difference(g, b)).log(),
        "ld-dpo": ld,
        "rpo": lambda g, b: dpo(g, b) + nll(g),
        "rpo-token": dpo,
        "simpo": simpo,
        "cpo": lambda g, b: -sigma(beta * (g.total - b.total)).log(),
        "orpo": lambda g, b: nll(g) - beta * sigma(g.odds - b.odds).log(),
    }


def step_losses(pairs: Pairs, beta: float, baseline: float) -> dict[str, torch.Tensor]:
    """Return loss name → loss of one step over all `pairs` (a scalar)."""
    losses = {
        name: torch.stack([loss(*pair) for pair in pairs]).mean()
        for name, loss in pair_losses(beta).items()
    }
    per_token = -torch.cat([chosen.policy for chosen, _ in pairs]).mean()
    losses["rpo-token"] = losses["rpo-token"] + per_token
    losses["cpo"] = losses["cpo"] + per_token
    for name, weight in (("kto", 1.0), ("kto-weighed", UNDESIRABLE)):
        chosen = [1 - sigma(beta * (chosen_answer.ratio - baseline)) for chosen_answer, _ in pairs]
        rejected = [
            weight * (1 - sigma(beta * (baseline - rejected_answer.ratio)))
            for _, rejected_answer in pairs
        ]
        losses[name] = torch.stack(chosen + rejected).mean()
    return losses


def find_baseline(model: Any) -> float:
    """Return z of KTO, from each of the eight prompts with the answer of the previous row."""
    rows = [(p, y) for p, y, _ in given.PAIRS] + [(p, n) for p, _, n in given.PAIRS]
    with torch.no_grad():
        ratios = [create_answer(model, rows[i][0], rows[i - 1][1]).ratio for i in range(len(rows))]
    return max(0.0, float(torch.stack(ratios).mean()))


def loss_and_norms(model: Any, loss: torch.Tensor) -> list[float]:
    """Return a loss and its gradient norms over all A and over all B."""
    model.zero_grad()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return [loss.item(), *given.gradient_norms(model)]


def reward_figures() -> tuple[list[list[float]], dict[str, list[float]]]:
    """Return the scores of both answers of each pair, and expected values of reward losses."""
    model = given.build_model(has_score_head=True).double()
    scores = torch.stack([
        torch.stack([
            model(torch.tensor([[*prompt.encode(), *answer_ids.encode(), given.EOS]])).logits[0, 0]
            for answer_ids in answers
        ])
        for prompt, *answers in given.PAIRS
    ])  # fmt: skip
    margins, found = torch.tensor(given.MARGINS).double(), {}
    for name, has_margins, center in (
        ("plain", False, 0.0), ("margins", True, 0.0), ("centred", False, 0.01)
    ):  # fmt: skip
        log_ratios = [
            -sigma(chosen - rejected - (margins[i] if has_margins else 0)).log()
            + center * (chosen + rejected) ** 2
            for i, (chosen, rejected) in enumerate(scores)
        ]
        found[name] = loss_and_norms(model, torch.stack(log_ratios).mean())
    return scores.tolist(), found


def main() -> None:
    """Print the expected values."""
    model = given.build_model().double()
    pairs = [
        (create_answer(model, prompt, chosen), create_answer(model, prompt, rejected))
        for prompt, chosen, rejected in given.PAIRS
    ]
    baseline = find_baseline(model)
    steps = [step_losses(pairs, beta, baseline) for beta in BETAS]
    scores, rewards = reward_figures()
    output = {
        "made_by": f"tests/make_preference_figures.py, float64, torch {torch.__version__}",
        "policy": [[answer.total.item() for answer in pair] for pair in pairs],
        "reference": [[answer.reference.sum().item() for answer in pair] for pair in pairs],
        "lengths": [[answer.tokens for answer in pair] for pair in pairs],
        "baseline": baseline,
        "losses": {
            name: [loss_and_norms(model, step[name]) for step in steps] for name in steps[0]
        },
        "scores": scores,
        "rewards": rewards,
    }  # fmt: skip
    print(json.dumps(_rounded(output), indent=1))


def _rounded(value: Any) -> Any:
    """Return `value` with floats rounded to eight digits."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.8g}")
    return value


if __name__ == "__main__":
    main()
