"""`transformers.Trainer`, with the loss of an optimizer step as the mean over its targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from ftlevel.tasks.objectives import Objective


class FtlevelTrainer(Trainer):
    """Overrides the loss, the count of its targets, and evaluation, which reduces by batch.

    The loss of an optimizer step is the sum over its targets (tokens, words, rows, ends of spans),
    divided by their number in all of its micro-batches, whatever the model's own loss would do:
    T5, BART and the classification models of transformers 5.24 average within a micro-batch and
    ignore `num_items_in_batch`.

    Attributes:
        tokens_seen: tokens of training rows that went through the model, without padding.
        penalty: model → what its method adds to the loss of an optimizer step, or None. It is in
            the gradient alone: the loss that is logged is the one that evaluation measures.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        evaluator: Any = None,
        penalty: Callable[[Any], torch.Tensor] | None = None,
        **arguments: Any,
    ):
        super().__init__(**arguments)
        self.objective = objective
        self.penalty = penalty
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
        """Return the micro-batch's share of the optimizer step's mean loss (a scalar)."""
        mask = inputs["attention_mask"]
        self.tokens_seen += mask.sum()
        inputs, labels = self.objective.split(inputs)
        outputs = model(**inputs)
        total = self.objective.loss_sum(self.objective.logits(outputs), labels, mask)
        count = self.objective.count(labels) if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if self.penalty is not None and model.training:
            extra = self.penalty(self.accelerator.unwrap_model(model))
            loss = loss + (extra - extra.detach()) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | None:
        """Return the number of targets of an optimizer step, over all processes.

        Trainer counts labels that are not -100, shifted by the model's own loss; for spans, numbers
        and several labels a row that is another number than the loss is a sum over.
        """
        if not batch_samples:
            return None
        counts = [self.objective.count(batch["labels"]) for batch in batch_samples]
        total = torch.stack([count.to(device) for count in counts]).sum()
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            total = self.accelerator.gather(total).sum()
        return total

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
