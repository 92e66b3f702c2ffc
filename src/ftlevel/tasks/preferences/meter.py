"""How a policy does on judged answers: rewards, accuracies, log-likelihoods, lengths.

A share is of all pairs that were seen, whatever batches they came in, and a tie is no success.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_COLUMNS = 6
"""Kept of an answer: whether it is good, its log-likelihood and tokens, the reference's
log-likelihood, its reward, and the baseline."""
_PAIR, _JUDGED = ("chosen", "rejected"), ("desirable", "undesirable")


def metric_names(*, paired: bool, referenced: bool) -> tuple[str, ...]:
    """Return what a meter computes.

    Args:
        paired: whether answers come in pairs.
        referenced: whether there is a reference.
    """
    groups = _PAIR if paired else _JUDGED
    kinds = ("logp", "length", *(("reward", "ref_logp") if referenced else ()))
    names = [f"{kind}_{group}" for kind in kinds for group in groups]
    names += ["logp_accuracy", "logp_mean_accuracy", "length_accuracy"] if paired else []
    names += ["reward_margin"] if referenced else []
    names += [("reward_accuracy" if paired else "kl")] if referenced else []
    return tuple(names)


class JudgedMeter:
    """Keeps a few numbers of each answer, and so can be pooled in any order.

    Args:
        objective: says how answers are rewarded, and whether they come in pairs.
    """

    def __init__(self, objective: Any) -> None:
        self._objective = objective
        self._seen: list[np.ndarray] = []

    def update(self, logits: torch.Tensor, labels: torch.Tensor, rows: Sequence[Any]) -> None:
        """Add answers: `logits` are `answers` (n, 2) and `labels` the verdicts (n, 3)."""
        import torch

        rewards = self._objective.rewards(logits, labels)
        columns = [labels[:, 0], logits[:, 0], logits[:, 1], labels[:, 1], rewards, labels[:, 2]]
        self._seen.append(torch.stack(columns, dim=1).cpu().double().numpy())

    def pool(self, meters: Sequence[JudgedMeter]) -> JudgedMeter:
        """Return a meter of all their answers."""
        pooled = JudgedMeter(self._objective)
        pooled._seen = [part for meter in meters for part in meter._seen]
        return pooled

    def compute(self, loss: float) -> dict[str, float]:
        """Return the metrics, each a mean over answers or pairs."""
        seen = np.concatenate(self._seen) if self._seen else np.zeros((0, _COLUMNS))
        good = seen[:, 0] > 0
        names = _PAIR if self._objective.is_paired else _JUDGED
        groups = dict(zip(names, (seen[good], seen[~good]), strict=True))
        found: dict[str, float] = {}
        for name, group in groups.items():
            found[f"logp_{name}"] = _mean(group[:, 1])
            found[f"length_{name}"] = _mean(group[:, 2])
            if self._objective.needs_reference:
                found[f"reward_{name}"] = _mean(group[:, 4])
                found[f"ref_logp_{name}"] = _mean(group[:, 3])
        if self._objective.is_paired:
            found |= self._compare(*groups.values())
        elif self._objective.needs_reference:
            first, second = (_mean(group[:, 4]) for group in groups.values())
            found["reward_margin"] = first - second
            found["kl"] = _mean(seen[:, 5])
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def _compare(self, good: np.ndarray, bad: np.ndarray) -> dict[str, float]:
        """Return what is said of pairs, answer beside answer."""
        length = (good[:, 2] > bad[:, 2]) + 0.5 * (good[:, 2] == bad[:, 2])
        found = {
            "logp_accuracy": _mean(good[:, 1] > bad[:, 1]),
            "logp_mean_accuracy": _mean(good[:, 1] / good[:, 2] > bad[:, 1] / bad[:, 2]),
            "length_accuracy": _mean(length),
        }
        if self._objective.needs_reference:
            found["reward_accuracy"] = _mean(good[:, 4] > bad[:, 4])
            found["reward_margin"] = _mean(good[:, 4] - bad[:, 4])
        return found

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the rewards and log-likelihoods of the answers of an example."""
        return {name: round(value, 4) for name, value in self.compute(math.nan).items()}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
