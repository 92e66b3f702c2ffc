"""What a model says of rows: its scores where a target is, kept to be compared with another's.

At most `MOST_TARGETS` are kept, which for a vocabulary of 128,000 is a quarter of a gigabyte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.evaluation.scoring import batches
from ftlevel.models.hardware import autocast
from ftlevel.task import Objective, TokenObjective

MOST_TARGETS = 512
_BATCH = 4


@dataclass(frozen=True)
class Scores:
    """What a model says of the rows.

    Attributes:
        logits: one tensor a batch, `(targets, choices)` in float32 on the CPU.
        loss: mean over the targets of the rows that were asked, in nats (of a regression, the
            squared error).
        targets: how many targets `logits` has.
        has_choice: whether a target is one choice of several.
    """

    logits: list[torch.Tensor]
    loss: float
    targets: int
    has_choice: bool = True

    def first(self, batches: int) -> Scores:
        """Return the scores of the first batches alone."""
        kept = self.logits[:batches]
        return replace(self, logits=kept, targets=sum(map(len, kept)))


@dataclass(frozen=True)
class Probe:
    """Rows, and how a model is asked about them.

    Attributes:
        rows: encoded rows.
        objective: what the models are trained on.
        pad_id: id of the padding token.
        device: torch device type.
    """

    rows: Sequence[Encoded]
    objective: Objective
    pad_id: int
    device: str

    def score(self, model: Any, dtype: str) -> Scores:
        """Return what `model`, in eval mode, says of the rows, computing in `dtype`."""
        kept, count, loss, total = [], 0, 0.0, 0
        collate, objective = Collator(self.pad_id), self.objective
        if isinstance(objective, TokenObjective):  # of judged answers, what is the same without
            objective = objective.of_tokens  # a reference
        with torch.no_grad(), autocast(self.device, dtype):
            for rows in batches(self.rows, _BATCH):
                batch = {name: value.to(self.device) for name, value in collate(rows).items()}
                inputs, labels = objective.split(batch)
                logits = objective.logits(model(**inputs))
                loss += objective.loss_sum(logits, labels, batch["attention_mask"]).item()
                total += int(objective.count(labels))
                scores = objective.choices(logits, labels, batch["attention_mask"])
                scores = scores[: MOST_TARGETS - count].float().cpu()
                count += len(scores)
                kept.append(scores)
                if count == MOST_TARGETS:
                    break
        return Scores(kept, loss / max(total, 1), count, self.objective.has_choice)
