"""Losses with the language head on supervised tokens only, and the tokens that a loss needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ftlevel.fast.cross_entropy import ChunkedCrossEntropy, Observe
from ftlevel.fast.packing import PackedLayout, using_layout
from ftlevel.fast.prefixes import SharedPrefix, using_prefix
from ftlevel.objectives import (
    LOSS_INPUTS,
    Objective,
    TokenObjective,
    TrainingLoss,
)


def base_model(model: Any) -> Any:
    """Returns the transformers model inside a PEFT model; another model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def compute_token_likelihoods(
    head: ChunkedCrossEntropy | None,
    model: Any,
    objective: TokenObjective,
    batch: Mapping[str, Any],
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns each target's log-likelihood, and each target's row in the batch, both (targets,).

    Logits are divided by `temperature`. Without a `head`, all logits are computed.
    """
    inputs, labels = prepare_inputs(model, objective, batch)
    at, targets = batch.get("located") or objective.locate(labels)
    if head is not None:
        likelihoods = head.likelihoods(lambda: model(**inputs), at, targets, temperature)
    else:
        scores = objective.logits(model(**inputs)).flatten(0, 1).index_select(0, at)
        scores = scores.float() / temperature
        likelihoods = -functional.cross_entropy(scores, targets, reduction="none")
    return likelihoods, at // labels.shape[1]


def _compute_likelihood_loss(
    head: ChunkedCrossEntropy | None, model: Any, objective: Objective, batch: Mapping[str, Any]
) -> Tensor | None:
    """Returns the summed loss (a scalar) of log-likelihoods; None for other losses."""
    own: Any = objective

    def compute(temperature: float) -> tuple[Tensor, Tensor]:
        return compute_token_likelihoods(head, model, own, batch, temperature)

    return objective.likelihood_loss(batch, compute)


def compute_full_loss(
    model: Any, objective: Objective, batch: dict[str, Tensor], mask: Tensor, loss: TrainingLoss
) -> tuple[Tensor, Tensor, Any]:
    """Returns (summed loss, labels, model outputs or None), computing logits at all positions."""
    if (total := _compute_likelihood_loss(None, model, objective, batch)) is not None:
        return total, batch["labels"], None
    fed, labels = objective.split(batch)
    outputs = model(**fed)
    if (compute := objective.get_chunk_loss(batch)) is not None:
        logits, targets = objective.targets(objective.logits(outputs), labels)
        return compute(logits, targets, slice(None)), labels, None
    return objective.training_sum(objective.logits(outputs), labels, mask, loss), labels, outputs


def prepare_inputs(
    model: Any, objective: TokenObjective, batch: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns inputs for `model` without labels, so that it computes no loss, and the labels."""
    inputs: dict[str, Any] = dict(batch)
    for name in (*LOSS_INPUTS, "located"):
        inputs.pop(name, None)
    labels = inputs.pop("labels")
    if objective.feeds_labels:
        base = base_model(getattr(model, "module", model))  # DDP's wrapper has no such method
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    return inputs, labels


def supervised_loss(
    head: ChunkedCrossEntropy,
    model: Any,
    objective: Any,
    batch: Mapping[str, Any],
    observe: Observe | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Returns a batch's summed loss with `head` run at targets only; `observe` gets the logits."""
    if (total := _compute_likelihood_loss(head, model, objective, batch)) is not None:
        return total
    inputs, labels = prepare_inputs(model, objective, batch)
    at, targets = batch.get("located") or objective.locate(labels)
    if (compute := objective.get_chunk_loss(batch)) is not None:
        return head.custom_loss_sum(
            lambda: model(**inputs),
            at,
            lambda logits, chunk: compute(logits, targets[chunk], chunk),
        )
    return head.loss_sum(lambda: model(**inputs), at, targets, observe, smoothing)


def compute_shared_prefix(
    head: ChunkedCrossEntropy, model: Any, layout: PackedLayout, batch: dict[str, Tensor]
) -> SharedPrefix:
    """Returns keys and values of a prefix that all rows share; `batch` has only the prefix."""
    prefix = SharedPrefix(layout.tokens)
    empty = torch.zeros(0, dtype=torch.long, device=batch["input_ids"].device)
    with using_layout(layout), using_prefix(prefix):
        head.loss_sum(lambda: model(**batch), empty, empty)
    prefix.close()
    return prefix


Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class SupervisedTokens:
    """Selects the tokens that predict a target of a language head."""

    objective: Any

    def __call__(self, batch: Batch) -> Tensor:
        """Returns the flat indices into (batch, seq) of tokens that predict a target, (needed,)."""
        at, _ = self.objective.locate(batch["labels"])
        return at


@dataclass(frozen=True)
class PooledTokens:
    """Selects the first or the last token of each right-padded row, for a classifier.

    With `last`, also the last token other than `pad_id`: classifiers pool it if rows end with that.
    """

    last: bool
    pad_id: int

    def __call__(self, batch: Batch) -> Tensor:
        """Returns the flat indices into (batch, seq) of the tokens that may be pooled."""
        mask = batch["attention_mask"]
        first = torch.arange(len(mask), device=mask.device) * mask.shape[1]
        if not self.last:
            return first
        columns = torch.arange(mask.shape[1], device=mask.device)
        unpadded = (columns * (batch["input_ids"] != self.pad_id)).argmax(dim=1)
        return torch.cat([first + mask.sum(dim=1) - 1, first + unpadded])


TokenSelector = SupervisedTokens | PooledTokens
