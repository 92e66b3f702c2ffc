"""How likely whole answers are: measured once by a reference, and in each step by the policy.

The loss of a batch whose language head is computed on its supervised tokens only.

Which tokens of a batch are needed after the last block: those that a loss depends on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ftlevel.fast.head.cross_entropy import ChunkedCrossEntropy, Observe
from ftlevel.fast.packing import PackedLayout, using_layout
from ftlevel.fast.prefixes import SharedPrefix, using_prefix
from ftlevel.task import (
    LikelihoodObjective,
    Objective,
    TaughtObjective,
    TokenObjective,
    TrainingLoss,
)


def base_model(model: Any) -> Any:
    """Return the transformers model under an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def measure_answers(
    head: ChunkedCrossEntropy | None,
    model: Any,
    objective: LikelihoodObjective,
    batch: Mapping[str, Any],
) -> torch.Tensor:
    """Return how likely the answers of a batch are, as `LikelihoodObjective.answers` gives it.

    Args:
        head: the head of `model`; None where all of its scores are to be computed.
        model: what is called.
        objective: what it is trained on.
        batch: inputs and labels.
    """
    inputs, labels = as_called(model, objective, batch)
    at, targets = batch.get("located") or objective.locate(labels)
    if head is not None:
        each = head.likelihoods(lambda: model(**inputs), at, targets)
    else:
        scores = objective.logits(model(**inputs)).flatten(0, 1).index_select(0, at)
        each = -functional.cross_entropy(scores.float(), targets, reduction="none")
    return objective.answers(each, labels)


def plain_loss(
    model: Any,
    objective: Objective,
    batch: dict[str, torch.Tensor],
    mask: torch.Tensor,
    loss: TrainingLoss,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return the loss of training, summed, from all scores of a batch; its labels; the outputs."""
    if isinstance(objective, LikelihoodObjective):
        answers = measure_answers(None, model, objective, batch)
        total = objective.judge(answers, batch["verdicts"], training=True)
        return total, batch["labels"], None
    fed, labels = objective.split(batch)
    if isinstance(objective, TaughtObjective) and "known" in batch:
        scores, targets = objective.targets(objective.logits(model(**fed)), labels)
        total = objective.taught_sum(scores, targets, batch["known"], batch["ids"])
        return total, labels, None
    outputs = model(**fed)
    return objective.training_sum(objective.logits(outputs), labels, mask, loss), labels, outputs


def with_baseline(verdicts: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
    """Return `verdicts` (answers, 3) of which `baseline` (a scalar) is taken off each reward."""
    return torch.cat([verdicts[:, :2], baseline.expand(len(verdicts), 1)], dim=1)


def sum_of_ratios(
    head: ChunkedCrossEntropy | None,
    model: Any,
    objective: LikelihoodObjective,
    batches: Sequence[dict[str, Any]],
) -> torch.Tensor:
    """Return the summed log-ratios of policy and reference, and how many there are (2,).

    Nothing is dropped and no gradient is kept; the mode of `model` is as before.

    Args:
        head: as of `measure_answers`.
        model: the policy.
        objective: what it is trained on.
        batches: answers with `verdicts`, and a `layout` where they are packed.
    """
    total = torch.zeros(2)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                own = {name: value for name, value in batch.items() if name != "layout"}
                with using_layout(batch.get("layout")):
                    answers = measure_answers(head, model, objective, own)
                ratios = answers[:, 0] - own["verdicts"][:, 1]
                total += torch.stack([ratios.sum(), torch.ones_like(ratios).sum()]).cpu()
    finally:
        model.train(training)
    return total


def as_called(
    model: Any, objective: TokenObjective, batch: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what `model` is called with for its scores, and the labels."""
    inputs: dict[str, Any] = dict(batch)
    for name in ("verdicts", "located", "known", "ids"):
        inputs.pop(name, None)
    labels = inputs.pop("labels")
    if objective.feeds_labels:
        base = base_model(getattr(model, "module", model))  # DDP's wrapper has no such method
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    return inputs, labels


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
