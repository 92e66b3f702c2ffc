"""Distillation: what a teacher expects at each supervised token, as one more target of text tasks.

With p the teacher's probabilities and q the model's, both of scores divided by the temperature T:

    L = (1 - w) (-log q(y), of T = 1) + w T² D(p, q)     Hinton et al., 1503.02531, section 2
    forward-kl   Σ p (log p - log q)
    reverse-kl   Σ q (log q - log p)                                      Gu et al., 2306.08543
    jsd          β KL(p, m) + (1 - β) KL(q, m),  m = β p + (1 - β) q  Agarwal et al., 2306.13649

Of the teacher's k likeliest tokens alone, all others are one outcome more, with the probability
that is left: the distance of these k + 1 is at most that of the whole vocabulary, and 0 where that
is 0. Without that outcome a model would be asked to give the k tokens all of its probability.

Rows with what a teacher expects of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ftlevel.config.preference import DistillationConfig
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.sources.lines import Computed
from ftlevel.task import TaughtObjective
from ftlevel.tasks.tokens import Tokens

if TYPE_CHECKING:
    import numpy as np
    import torch


LEAST = -1e4
"""A log-probability is kept as no less, so that one of zero has a finite distance."""


@dataclass(frozen=True)
class Taught(Tokens, TaughtObjective):
    """Cross entropy over tokens, and the distance from a teacher where a batch has one.

    Attributes:
        settings: which distance, and how much it counts.
    """

    settings: DistillationConfig = field(default_factory=DistillationConfig)

    def taught_sum(
        self,
        scores: torch.Tensor,
        targets: torch.Tensor,
        known: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss summed over targets (a scalar), as of `TaughtObjective`."""
        from torch.nn import functional

        settings, temperature = self.settings, self.settings.kd_temperature
        own = log_outcomes(scores.float() / temperature, ids, known.shape[-1])
        total = temperature**2 * divergence(known, own, settings).sum()
        if settings.kd_ratio == 1:
            return total
        entropy = functional.cross_entropy(scores.float(), targets, reduction="sum")
        return (1 - settings.kd_ratio) * entropy + settings.kd_ratio * total


def log_outcomes(scores: torch.Tensor, ids: torch.Tensor, outcomes: int) -> torch.Tensor:
    """Return the log-probabilities of the tokens `ids`, and of all others as one behind them.

    Args:
        scores: (targets, vocabulary), float32, divided by the temperature.
        ids: (targets, k); k = 0 for the first `outcomes` tokens of the vocabulary, one by one, as
            if there were no others.
        outcomes: k + 1 where there are ids.
    """
    if not ids.shape[-1]:
        return scores[:, :outcomes].log_softmax(-1)
    whole = scores.logsumexp(-1, keepdim=True)
    others = scores.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    import torch

    return torch.cat([scores.gather(-1, ids), others], dim=-1) - whole


def divergence(
    known: torch.Tensor, own: torch.Tensor, settings: DistillationConfig
) -> torch.Tensor:
    """Return the distance of each target (targets,).

    Args:
        known: (targets, outcomes) log-probabilities by the teacher.
        own: (targets, outcomes) those by the model.
        settings: which distance.
    """
    import torch

    if settings.divergence == "forward-kl":
        return (known.exp() * (known - own)).sum(-1)
    if settings.divergence == "reverse-kl":
        return (own.exp() * (own - known)).sum(-1)
    beta = settings.jsd_beta
    mixed = torch.logaddexp(known + math.log(beta), own + math.log1p(-beta))
    of_teacher = (known.exp() * (known - mixed)).sum(-1)
    return beta * of_teacher + (1 - beta) * (own.exp() * (own - mixed)).sum(-1)


def build_taught(objective: Tokens, settings: DistillationConfig) -> Taught:
    """Return `objective` with a teacher."""
    known = {f.name: getattr(objective, f.name) for f in fields(objective)}
    return Taught(**known, settings=settings)


def outcome_dtype(settings: DistillationConfig, vocabulary: int) -> Any:
    """Return numpy's type of what is kept of the teacher at a target.

    Args:
        settings: how much is kept.
        vocabulary: tokens that both models score.
    """
    import numpy as np

    wish = settings.kd_top_k
    if wish == "all" or wish >= vocabulary - 1:
        return np.dtype([("known", np.float32, (vocabulary,)), ("ids", np.int32, (0,))])
    return np.dtype([("known", np.float32, (wish + 1,)), ("ids", np.int32, (wish,))])


def likeliest(
    scores: torch.Tensor, settings: DistillationConfig, dtype: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is kept of a teacher's `scores` (targets, vocabulary): `known` and `ids`."""
    tempered = scores.float() / settings.kd_temperature
    count, outcomes = dtype["ids"].shape[0], dtype["known"].shape[0]
    if not count:  # what only one of the two scores is left out
        ids = tempered.new_zeros((len(tempered), 0)).long()
    else:
        ids = tempered.topk(count, dim=-1).indices
    return log_outcomes(tempered, ids, outcomes).clamp(min=LEAST), ids


@dataclass(frozen=True)
class TaughtRow(Encoded):
    """A row with what a teacher expects.

    Attributes:
        taught: an array of `outcome_dtype`, one for each target that is predicted.
    """

    taught: Any = field(default=None, compare=False, metadata={"column": "json"})

    @property
    def branches(self) -> Sequence[Encoded]:
        """The row itself; what the teacher expects is of the batch."""
        return [Encoded(self.input_ids, self.labels, self.row, self.extras)]

    @property
    def teacher(self) -> np.ndarray | None:
        """What the teacher expects."""
        return self.taught


class TaughtRows(Computed[Encoded]):
    """Rows with what a teacher expects of them.

    Args:
        rows: of text.
        kept: (targets,) of `outcome_dtype`, row after row.
        begins: of each row, where its own begin; and behind the last, where they end.
    """

    def __init__(self, rows: Sequence[Encoded], kept: np.ndarray, begins: Sequence[int]) -> None:
        self.rows, self._kept, self._begins = rows, kept, begins

    def __len__(self) -> int:
        return len(self.rows)

    def _item(self, at: int) -> Encoded:
        row, own = self.rows[at], slice(self._begins[at], self._begins[at + 1])
        return TaughtRow(row.input_ids, row.labels, row.row, row.extras, self._kept[own])
