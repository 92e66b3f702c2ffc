"""Compute tests/preference_figures.json: preference losses by a plain float64 script.

    python tests/make_preference_figures.py > tests/preference_figures.json

Weights and rows are those of `tests/preference_figures.py`; nothing of the package computes here.
Each answer goes through the model alone, with all of its scores; the formulas are written as the
papers have them, pair by pair; gradients are autograd's. In float64 but for the norms, which
transformers computes in float32 whatever it is given: figures are right to about seven digits, and
what float32 is held to is the formula and not another rounding of it.
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
        """How many there are."""
        return len(self.policy)

    @property
    def total(self) -> torch.Tensor:
        """Of the whole answer."""
        return self.policy.sum()

    @property
    def ratio(self) -> torch.Tensor:
        """Log of the policy's likelihood over the reference's."""
        return self.total - self.reference.sum()

    @property
    def odds(self) -> torch.Tensor:
        """Log of the odds of its mean token."""
        mean = self.total / self.tokens
        return mean - torch.log1p(-mean.exp())

    def weighed(self, shorter: int) -> torch.Tensor:
        """Return its ratio, of which tokens beyond `shorter` count for ALPHA."""
        each = self.policy - self.reference
        return each[:shorter].sum() + ALPHA * each[shorter:].sum()


Pairs = list[tuple[Answer, Answer]]


def likelihoods(model: Any, prompt: str, answer: str) -> torch.Tensor:
    """Return the log-probability of each token of an answer and its EOS, given its prompt."""
    asked, said = list(prompt.encode()), [*answer.encode(), given.EOS]
    scores = model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
    return torch.stack([scores[len(asked) - 1 + i, token] for i, token in enumerate(said)])


def read(model: Any, prompt: str, answer: str) -> Answer:
    """Return an answer as policy and reference see it; the reference is the base."""
    with torch.no_grad(), model.disable_adapter():
        reference = likelihoods(model, prompt, answer)
    return Answer(likelihoods(model, prompt, answer), reference)


def sigma(value: torch.Tensor) -> torch.Tensor:
    """Return 1 / (1 + exp(-value))."""
    return 1 / (1 + (-value).exp())


def nll(good: Answer) -> torch.Tensor:
    """Return the mean loss of an answer's tokens."""
    return -good.total / good.tokens


def of_pairs(beta: float) -> dict[str, Callable[[Answer, Answer], torch.Tensor]]:
    """Return name → the loss of a pair, preferred answer first."""

    def h(good: Answer, bad: Answer) -> torch.Tensor:
        return good.ratio - bad.ratio

    def mean_h(good: Answer, bad: Answer) -> torch.Tensor:
        return good.ratio / good.tokens - bad.ratio / bad.tokens

    def dpo(good: Answer, bad: Answer) -> torch.Tensor:
        return -sigma(beta * h(good, bad)).log()

    def swapped(good: Answer, bad: Answer) -> torch.Tensor:
        return -sigma(-beta * h(good, bad)).log()

    def ld(good: Answer, bad: Answer) -> torch.Tensor:
        shorter = min(good.tokens, bad.tokens)
        return -sigma(beta * (good.weighed(shorter) - bad.weighed(shorter))).log()

    def simpo(good: Answer, bad: Answer) -> torch.Tensor:
        difference = good.total / good.tokens - bad.total / bad.tokens
        return -sigma(beta * difference - GAMMA).log()

    return {
        "dpo": dpo,
        "cdpo": lambda g, b: (1 - EPSILON) * dpo(g, b) + EPSILON * swapped(g, b),
        "robust": lambda g, b: (
            ((1 - EPSILON) * dpo(g, b) - EPSILON * swapped(g, b)) / (1 - 2 * EPSILON)
        ),
        "hinge": lambda g, b: (1 - beta * h(g, b)).clamp(min=0),
        "ipo-sum": lambda g, b: (h(g, b) - 1 / (2 * beta)) ** 2,
        "ipo": lambda g, b: (mean_h(g, b) - 1 / (2 * beta)) ** 2,
        "dpo-norm": lambda g, b: -sigma(beta * mean_h(g, b)).log(),
        "ld-dpo": ld,
        "rpo": lambda g, b: dpo(g, b) + nll(g),
        "rpo-token": dpo,
        "simpo": simpo,
        "cpo": lambda g, b: -sigma(beta * (g.total - b.total)).log(),
        "orpo": lambda g, b: nll(g) - beta * sigma(g.odds - b.odds).log(),
    }


def of_steps(pairs: Pairs, beta: float, baseline: float) -> dict[str, torch.Tensor]:
    """Return name → the loss of a step of all `pairs` (a scalar)."""
    found = {
        name: torch.stack([loss(*pair) for pair in pairs]).mean()
        for name, loss in of_pairs(beta).items()
    }
    per_token = -torch.cat([good.policy for good, _ in pairs]).mean()
    found["rpo-token"] = found["rpo-token"] + per_token
    found["cpo"] = found["cpo"] + per_token
    for name, weight in (("kto", 1.0), ("kto-weighed", UNDESIRABLE)):
        good = [1 - sigma(beta * (one.ratio - baseline)) for one, _ in pairs]
        bad = [weight * (1 - sigma(beta * (baseline - other.ratio))) for _, other in pairs]
        found[name] = torch.stack(good + bad).mean()
    return found


def find_baseline(model: Any) -> float:
    """Return z of KTO: each of the eight prompts with the answer of the row before it."""
    rows = [(p, y) for p, y, _ in given.PAIRS] + [(p, n) for p, _, n in given.PAIRS]
    with torch.no_grad():
        ratios = [read(model, rows[i][0], rows[i - 1][1]).ratio for i in range(len(rows))]
    return max(0.0, float(torch.stack(ratios).mean()))


def figures(model: Any, loss: torch.Tensor) -> list[float]:
    """Return a loss, and the norms of its gradient over all A and over all B."""
    model.zero_grad()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return [loss.item(), *given.norms(model)]


def rewards() -> tuple[list[list[float]], dict[str, list[float]]]:
    """Return the scores of both answers of each pair, and the figures of the losses of scores."""
    model = given.build_model(scores=True).double()
    scores = torch.stack([
        torch.stack([
            model(torch.tensor([[*prompt.encode(), *said.encode(), given.EOS]])).logits[0, 0]
            for said in answers
        ])
        for prompt, *answers in given.PAIRS
    ])  # fmt: skip
    margins, found = torch.tensor(given.MARGINS).double(), {}
    for name, has_margins, center in (
        ("plain", False, 0.0), ("margins", True, 0.0), ("centred", False, 0.01)
    ):  # fmt: skip
        each = [
            -sigma(good - bad - (margins[i] if has_margins else 0)).log()
            + center * (good + bad) ** 2
            for i, (good, bad) in enumerate(scores)
        ]
        found[name] = figures(model, torch.stack(each).mean())
    return scores.tolist(), found


def main() -> None:
    """Print the figures."""
    model = given.build_model().double()
    pairs = [
        (read(model, prompt, good), read(model, prompt, bad)) for prompt, good, bad in given.PAIRS
    ]
    baseline = find_baseline(model)
    steps = [of_steps(pairs, beta, baseline) for beta in BETAS]
    scores, of_scores = rewards()
    told = {
        "made_by": f"tests/make_preference_figures.py, float64, torch {torch.__version__}",
        "policy": [[answer.total.item() for answer in pair] for pair in pairs],
        "reference": [[answer.reference.sum().item() for answer in pair] for pair in pairs],
        "lengths": [[answer.tokens for answer in pair] for pair in pairs],
        "baseline": baseline,
        "losses": {
            name: [figures(model, step[name]) for step in steps] for name in steps[0]
        },
        "scores": scores,
        "rewards": of_scores,
    }  # fmt: skip
    print(json.dumps(_rounded(told), indent=1))


def _rounded(value: Any) -> Any:
    """Return `value` with floats of eight digits."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.8g}")
    return value


if __name__ == "__main__":
    main()
