"""Ask a model itself whether its head on supervised tokens gives the scores that it would give.

What a family does to the scores of its head (a cap, a scale, a constant) is known by the names in
its config. A family that says it by another name, or whose forward pass asks the head for something
else, would be trained and scored on other numbers in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.fast.head.cross_entropy import ChunkedCrossEntropy
from ftlevel.fast.head.loss import supervised_loss
from ftlevel.fast.packing.layout import NotServedError
from ftlevel.models.hardware import autocast
from ftlevel.task import TokenObjective

LENGTHS = 16, 12
"""Tokens of the two rows that are tried."""

NOISE = {"float32": 1e-5}
"""How far scores may be apart, relative to their norm; below float32 it is `COARSE`."""

COARSE = 1e-2


def find_cross_entropy_error(
    head: ChunkedCrossEntropy,
    model: Any,
    objective: TokenObjective,
    rows: Sequence[Encoded],
    pad_id: int,
    device: str,
    dtype: str,
) -> str:
    """Return why `head` cannot stand for the model's own, empty if it can.

    Args:
        head: on `model`.
        model: left in the mode that it is in.
        objective: what it is trained on.
        rows: encoded rows; the beginnings of two of the first ones are tried.
        pad_id: fills the batch.
        device: torch device type.
        dtype: compute precision's name.
    """
    objective = objective.of_tokens
    batch = {k: v.to(device) for k, v in Collator(pad_id)(_pair(rows, objective)).items()}
    inputs, labels = objective.split(batch)
    seen: list[torch.Tensor] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dtype):
            expected, _ = objective.targets(objective.logits(model(**inputs)), labels)
            supervised_loss(head, model, objective, batch, lambda scores, _: seen.append(scores))
    except NotServedError as error:
        return str(error)
    finally:
        model.train(training)
    found = torch.cat(seen)
    if found.shape != expected.shape or not _differ(found, expected) < NOISE.get(dtype, COARSE):
        return "it does more to the scores than its config says"
    return ""


def _pair(rows: Sequence[Encoded], objective: TokenObjective) -> list[Encoded]:
    """Return the beginnings of two rows, every token of which is a target."""
    pair = []
    first = rows[0].branches[0], rows[min(1, len(rows) - 1)].branches[0]
    for row, length in zip(first, LENGTHS, strict=True):
        ids = row.input_ids[:length]
        labels = list(row.labels[:length]) if isinstance(row.labels, list | tuple) else []
        extras = {name: values[:length] for name, values in row.extras.items()}
        own = [int(label) for label in labels] if objective.feeds_labels else ids
        pair.append(replace(row, input_ids=ids, labels=own, extras=extras))
    return pair


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference, relative to the norm."""
    one, other = one.float(), other.float()
    return ((one - other).norm() / other.norm()).item()
