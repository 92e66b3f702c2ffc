"""Which tokens of a batch are needed after the last block: those that a loss depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ftlevel.task import TokenObjective

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class SupervisedTokens:
    """Those that predict a target of a language head.

    Attributes:
        objective: says where they are.
    """

    objective: TokenObjective

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return (needed,) places in the flattened (batch, seq)."""
        at, _ = self.objective.locate(batch["labels"])
        return at


@dataclass(frozen=True)
class PooledTokens:
    """One of each row, of which a classifier makes its scores.

    Attributes:
        last: whether it is the last one that is not padding, and not the first.
    """

    last: bool

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return (batch,) places in the flattened (batch, seq), whose padding is on the right."""
        mask = batch["attention_mask"]
        first = torch.arange(len(mask), device=mask.device) * mask.shape[1]
        return first + mask.sum(dim=1) - 1 if self.last else first


NeededTokens = SupervisedTokens | PooledTokens
