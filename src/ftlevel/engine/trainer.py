"""`transformers.Trainer`, with the loss of an optimizer step as the mean over its targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer

from ftlevel.data.encode import IGNORED


class FtlevelTrainer(Trainer):
    """Overrides the loss, which counts what it sees, and evaluation, which reduces by batch.

    The loss of an optimizer step is the sum over its supervised tokens, or rows, divided by their
    number in all of its micro-batches, whatever the model's own loss would do: T5, BART and
    the classification models of transformers 5.24 average within a micro-batch and ignore
    `num_items_in_batch`.

    Attributes:
        tokens_seen: tokens of training rows that went through the model, without padding.
        penalty: model → what its method adds to the loss of an optimizer step, or None. It is in
            the gradient alone: the loss that is logged is the one that evaluation measures.
    """

    def __init__(
        self,
        *,
        kind: str,
        labelled: bool,
        evaluator: Any = None,
        penalty: Callable[[Any], torch.Tensor] | None = None,
        **arguments: Any,
    ):
        super().__init__(**arguments)
        self.penalty = penalty
        self.kind = kind
        self.labelled = labelled
        self.evaluator = evaluator
        self.tokens_seen = torch.zeros((), dtype=torch.long, device=self.args.device)
        self.model_accepts_loss_kwargs = True  # our loss divides by num_items_in_batch

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the micro-batch's share of the optimizer step's mean loss (a scalar, nats)."""
        self.tokens_seen += inputs["attention_mask"].sum()
        labels = inputs["labels"]
        if self.kind != "encoder-decoder" or self.labelled:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs)
        logits = outputs.logits
        if self.labelled:
            targets = labels
        else:
            if self.kind == "decoder":
                logits, labels = logits[:, :-1], labels[:, 1:]
            supervised = labels != IGNORED
            logits, targets = logits[supervised], labels[supervised]
        total = functional.cross_entropy(logits.float(), targets, reduction="sum")
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if self.penalty is not None and model.training:
            extra = self.penalty(self.accelerator.unwrap_model(model))
            loss = loss + (extra - extra.detach()) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,  # noqa: ARG002 - the evaluator has its rows
        ignore_keys: list[str] | None = None,  # noqa: ARG002 - nothing is returned but metrics
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the evaluator's metrics and log them, as Trainer does."""
        scores = self.evaluator(self.model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
