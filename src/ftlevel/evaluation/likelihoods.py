"""Score whole answers: their log-likelihoods, and the objective's loss and metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.fast.head.cross_entropy import ChunkedCrossEntropy
from ftlevel.fast.head.likelihoods import compute_answer_likelihoods, sum_of_ratios, with_baseline
from ftlevel.fast.step import chunked_cross_entropy
from ftlevel.models.hardware import autocast
from ftlevel.task import LikelihoodObjective, Objective

Measured = tuple[list[int], dict[str, torch.Tensor], torch.Tensor]
"""Row indices, their batch, and the log-likelihoods of its answers."""


class ScoringContext(Protocol):
    """The attributes of an `Evaluator` that scoring needs."""

    @property
    def rows(self) -> Sequence[Encoded]:
        """Encoded rows."""

    @property
    def tokenizer(self) -> Any:
        """Tokenizer, for its padding id."""

    @property
    def objective(self) -> Objective:
        """Training objective."""

    @property
    def device(self) -> str:
        """Torch device type."""

    @property
    def dtype(self) -> str:
        """Name of the compute precision."""

    @property
    def batch_size(self) -> int:
        """Rows per forward pass."""

    @property
    def chunked_cross_entropy(self) -> bool:
        """Whether the language head runs on supervised tokens only."""


class AnswerRecord(Protocol):
    """Receives every scored answer."""

    def add_answers(
        self, rows: Sequence[Encoded], answers: torch.Tensor, verdicts: torch.Tensor
    ) -> None:
        """Record a batch, with the arguments of `LikelihoodObjective.judge`."""


def score_answers(
    evaluator: ScoringContext, model: Any, record: AnswerRecord | None
) -> dict[str, float]:
    """Return the loss and metrics of `model` on the evaluator's rows."""
    objective = _objective_of(evaluator)
    meter, total, count, rows = objective.meter(), 0.0, 0, evaluator.rows
    with _head(evaluator, model) as head:
        baseline = _measure_baseline(evaluator, model, head)
        for chosen, batch, answers in _measure(evaluator, model, rows, head):
            verdicts = batch["verdicts"]
            if baseline is not None:
                verdicts = with_baseline(verdicts, baseline.to(verdicts.device))
            own = [rows[i] for i in chosen]
            total += objective.preference_sum(answers, verdicts, training=False).item()
            count += int(objective.count(batch["labels"]))
            meter.update(answers, verdicts, own)
            if record is not None:
                record.add_answers(own, answers, verdicts)
    loss = total / count
    return {"loss": loss, **meter.compute(loss)}


def compute_likelihoods(evaluator: ScoringContext, model: Any) -> np.ndarray:
    """Return the log-likelihoods of the two sequences of each row, (rows, 2) in float32.

    Batches are those of `score_answers`, so an unchanged model gives the same values, bit for bit.
    """
    rows, training = evaluator.rows, model.training
    found = np.zeros((len(rows), 2), dtype=np.float32)
    model.eval()
    try:
        with (
            torch.no_grad(),
            autocast(evaluator.device, evaluator.dtype),
            _head(evaluator, model) as head,
        ):
            for chosen, _, answers in _measure(evaluator, model, rows, head):
                sums = answers[:, 0].float().cpu().numpy().reshape(len(chosen), -1)
                found[chosen, : sums.shape[1]] = sums
            contrasts = _contrasts(rows)
            for chosen, _, answers in _measure(evaluator, model, contrasts, head):
                found[chosen, 1] = answers[:, 0].float().cpu().numpy()
    finally:
        model.train(training)
    return found


def _objective_of(evaluator: ScoringContext) -> LikelihoodObjective:
    if not isinstance(evaluator.objective, LikelihoodObjective):
        raise TypeError("only answers have a log-likelihood")
    return evaluator.objective


def _head(evaluator: ScoringContext, model: Any) -> Any:
    wanted = evaluator.objective if evaluator.chunked_cross_entropy else None
    pad_id = evaluator.tokenizer.pad_token_id or 0
    longest = sorted(evaluator.rows, key=lambda row: -row.length)[:2]
    return chunked_cross_entropy(model, wanted, longest, pad_id, evaluator.device, evaluator.dtype)


def _contrasts(rows: Sequence[Encoded]) -> list[Encoded]:
    return [other for row in rows for other in row.contrasts]


def _measure_baseline(
    evaluator: ScoringContext, model: Any, head: ChunkedCrossEntropy | None
) -> torch.Tensor | None:
    """Return the mean reward of all contrasts (a scalar, at least 0); None if not needed."""
    objective = _objective_of(evaluator)
    if not objective.needs_baseline:
        return None
    contrasts = _contrasts(evaluator.rows)
    batches = (batch for _, batch in _batches(evaluator, contrasts))
    total = sum_of_ratios(head, model, objective, list(batches))
    return (total[0] / total[1]).clamp(min=0)


def _measure(
    evaluator: ScoringContext, model: Any, rows: Sequence[Encoded], head: ChunkedCrossEntropy | None
) -> Iterator[Measured]:
    objective = _objective_of(evaluator)
    for chosen, batch in _batches(evaluator, rows):
        yield chosen, batch, compute_answer_likelihoods(head, model, objective, batch)


def _batches(
    evaluator: ScoringContext, rows: Sequence[Encoded]
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield row indices and padded batches of rows of similar length, longest first."""
    collate = Collator(evaluator.tokenizer.pad_token_id or 0)
    order = sorted(range(len(rows)), key=lambda i: rows[i].length, reverse=True)
    for start in range(0, len(order), evaluator.batch_size):
        chosen = order[start : start + evaluator.batch_size]
        batch = collate([rows[i] for i in chosen])
        yield chosen, {name: value.to(evaluator.device) for name, value in batch.items()}
