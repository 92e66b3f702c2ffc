"""Distillation loss of text tasks, and rows with stored teacher log-probabilities.

With teacher probabilities p and student probabilities q, logits divided by the temperature T:

    L = (1 - w) (-log q(y), of T = 1) + w T² D(p, q)     Hinton et al., 1503.02531, section 2
    forward-kl   Σ p (log p - log q)
    reverse-kl   Σ q (log q - log p)                                      Gu et al., 2306.08543
    jsd          β KL(p, m) + (1 - β) KL(q, m),  m = β p + (1 - β) q  Agarwal et al., 2306.13649

With top-k teacher tokens, the remaining probability is one extra outcome. The divergence of these
k + 1 outcomes is a lower bound of that of the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ftlevel.config.preference import DistillationConfig
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.sources.lines import LazySequence
from ftlevel.task import DistillationObjective
from ftlevel.tasks.losses import Tokens

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


MIN_LOG_PROBABILITY = -1e4
"""Lower bound of stored log-probabilities, so that divergences stay finite."""


@dataclass(frozen=True)
class DistillationTokens(Tokens, DistillationObjective):
    """Token cross entropy plus the divergence from a teacher, as `settings` define it."""

    settings: DistillationConfig = field(default_factory=DistillationConfig)

    def distillation_sum(
        self, scores: Tensor, targets: Tensor, known: Tensor, ids: Tensor
    ) -> Tensor:
        """Return the loss summed over targets (a scalar)."""
        from torch.nn import functional

        settings, temperature = self.settings, self.settings.kd_temperature
        student = log_outcomes(scores.float() / temperature, ids, known.shape[-1])
        total = temperature**2 * divergence(known, student, settings).sum()
        if settings.kd_ratio == 1:
            return total
        entropy = functional.cross_entropy(scores.float(), targets, reduction="sum")
        return (1 - settings.kd_ratio) * entropy + settings.kd_ratio * total


def log_outcomes(scores: Tensor, ids: Tensor, outcomes: int) -> Tensor:
    """Return log-probabilities of the tokens `ids`, and of all other tokens as a last outcome.

    Args:
        scores: `(targets, vocabulary)` logits divided by the temperature, float32.
        ids: `(targets, k)`; with k = 0, the first `outcomes` tokens are the vocabulary.
        outcomes: k + 1 if k > 0.
    """
    if not ids.shape[-1]:
        return scores[:, :outcomes].log_softmax(-1)
    total = scores.logsumexp(-1, keepdim=True)
    others = scores.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    import torch

    return torch.cat([scores.gather(-1, ids), others], dim=-1) - total


def divergence(teacher: Tensor, student: Tensor, settings: DistillationConfig) -> Tensor:
    """Return the divergence `(targets,)` of `(targets, outcomes)` log-probabilities."""
    import torch

    if settings.divergence == "forward-kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if settings.divergence == "reverse-kl":
        return (student.exp() * (student - teacher)).sum(-1)
    beta = settings.jsd_beta
    mixed = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher = (teacher.exp() * (teacher - mixed)).sum(-1)
    return beta * of_teacher + (1 - beta) * (student.exp() * (student - mixed)).sum(-1)


def build_distillation(objective: Tokens, settings: DistillationConfig) -> DistillationTokens:
    """Build `objective` with a distillation loss."""
    values = {f.name: getattr(objective, f.name) for f in fields(objective)}
    return DistillationTokens(**values, settings=settings)


def outcome_dtype(settings: DistillationConfig, vocabulary: int) -> Any:
    """Return the numpy dtype of the teacher's values for a shared `vocabulary` size."""
    import numpy as np

    count = settings.kd_top_k
    if count == "all" or count >= vocabulary - 1:
        return np.dtype([("known", np.float32, (vocabulary,)), ("ids", np.int32, (0,))])
    return np.dtype([("known", np.float32, (count + 1,)), ("ids", np.int32, (count,))])


def select_top_k(scores: Tensor, settings: DistillationConfig, dtype: Any) -> tuple[Tensor, Tensor]:
    """Return the `known` and `ids` to store of teacher logits `(targets, vocabulary)`."""
    tempered = scores.float() / settings.kd_temperature
    count, outcomes = dtype["ids"].shape[0], dtype["known"].shape[0]
    if not count:  # tokens beyond the shared vocabulary are dropped
        ids = tempered.new_zeros((len(tempered), 0)).long()
    else:
        ids = tempered.topk(count, dim=-1).indices
    return log_outcomes(tempered, ids, outcomes).clamp(min=MIN_LOG_PROBABILITY), ids


@dataclass(frozen=True)
class DistillationRow(Encoded):
    """Row with teacher values; `taught` is an array of `outcome_dtype`, one per target."""

    taught: Any = field(default=None, compare=False, metadata={"column": "json"})

    @property
    def branches(self) -> Sequence[Encoded]:
        """The row without teacher values, which belong to the batch."""
        return [Encoded(self.input_ids, self.labels, self.row, self.extras)]

    @property
    def teacher(self) -> np.ndarray | None:
        """The teacher's values."""
        return self.taught


class DistillationRows(LazySequence[Encoded]):
    """Rows with their teacher values.

    `values` `(targets,)` has `outcome_dtype`; row i has `values[starts[i]:starts[i + 1]]`.
    """

    def __init__(self, rows: Sequence[Encoded], values: np.ndarray, starts: Sequence[int]) -> None:
        self.rows, self._values, self._starts = rows, values, starts

    def __len__(self) -> int:
        return len(self.rows)

    def _item(self, at: int) -> Encoded:
        row, values = self.rows[at], self._values[self._starts[at] : self._starts[at + 1]]
        return DistillationRow(row.input_ids, row.labels, row.row, row.extras, values)
