"""The loss of a batch whose language head is computed on its supervised tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ftlevel.fast.head.cross_entropy import ChunkedCrossEntropy, Observe
from ftlevel.fast.head.likelihoods import as_called, measure_answers
from ftlevel.fast.head.likelihoods import base_model as base_model
from ftlevel.fast.packing.layout import PackedLayout, using_layout
from ftlevel.fast.prefixes.shared_prefix import SharedPrefix, using_prefix
from ftlevel.task import LikelihoodObjective, Objective, TaughtObjective, TokenObjective


def supervised_loss(
    head: ChunkedCrossEntropy,
    model: Any,
    objective: Objective,
    batch: Mapping[str, Any],
    observe: Observe | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the loss of a batch summed over its targets, its head computed on these alone.

    Args:
        head: the head of `model`.
        model: what is called.
        objective: what it is trained on.
        batch: inputs and labels, and where the targets are `located` if that is known.
        observe: is given scores and targets.
        smoothing: share of a target's probability that is spread over the vocabulary.
    """
    if isinstance(objective, LikelihoodObjective):
        answers = measure_answers(head, model, objective, batch)
        return objective.judge(answers, batch["verdicts"], training=True)
    if not isinstance(objective, TokenObjective):
        raise TypeError("a language head predicts tokens")
    inputs, labels = as_called(model, objective, batch)
    at, targets = batch.get("located") or objective.locate(labels)
    if isinstance(objective, TaughtObjective) and "known" in batch:
        known, ids, sum_of = batch["known"], batch["ids"], objective.taught_sum

        def compute(scores: torch.Tensor, own: slice) -> torch.Tensor:
            return sum_of(scores, targets[own], known[own], ids[own])

        return head.sum_of_losses(lambda: model(**inputs), at, compute)
    return head.loss_sum(lambda: model(**inputs), at, targets, observe, smoothing)


def compute_shared_prefix(
    head: ChunkedCrossEntropy, model: Any, layout: PackedLayout, batch: dict[str, torch.Tensor]
) -> SharedPrefix:
    """Return what all rows of a step begin with, computed by `model` without any loss.

    Args:
        head: the head of `model`.
        model: what is called.
        layout: of the prefix.
        batch: the prefix as a batch of one row.
    """
    prefix = SharedPrefix(layout.tokens)
    nowhere = torch.zeros(0, dtype=torch.long, device=batch["input_ids"].device)
    with using_layout(layout), using_prefix(prefix):
        head.loss_sum(lambda: model(**batch), nowhere, nowhere)
    prefix.close()
    return prefix
