"""Evaluation by the answers' log-likelihoods, and KTO's baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.evaluation.intervals import ExampleRecord, ExampleStats
from ftlevel.evaluation.scoring import BatchScores, Evaluator, merge_scores
from ftlevel.extras.preference.objective import Preferences
from ftlevel.fast.cross_entropy import ChunkedCrossEntropy
from ftlevel.fast.likelihoods import compute_token_likelihoods
from ftlevel.fast.packing import using_layout
from ftlevel.fast.step import chunked_cross_entropy
from ftlevel.models.hardware import eval_mode, evaluating
from ftlevel.trained.generation import batches

LABELS = "preference_labels"
"""Name of the labels in a batch: `(answers, 3)`, see `Preferences`."""


def compute_answers(
    head: ChunkedCrossEntropy | None, model: Any, objective: Preferences, batch: Mapping[str, Any]
) -> Tensor:
    """Returns each answer's log-likelihood and length, (answers, 2); `head` None: all logits."""
    likelihoods, owners = compute_token_likelihoods(head, model, objective, batch)
    return objective.answers(likelihoods, owners, len(batch["labels"]))


def sum_log_ratios(
    head: ChunkedCrossEntropy | None,
    model: Any,
    objective: Preferences,
    batches: Sequence[dict[str, Any]],
) -> Tensor:
    """Returns the sum and the number of the answers' log-ratios (policy / reference), (2,)."""
    total = torch.zeros(2, device=next(model.parameters()).device)
    with eval_mode(model), torch.no_grad():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "layout"}
            with using_layout(batch.get("layout")):
                answers = compute_answers(head, model, objective, inputs)
            ratios = answers[:, 0] - inputs[LABELS][:, 1]
            total += torch.stack([ratios.sum(), torch.ones_like(ratios).sum()])
    return total


def with_baseline(labels: Tensor, total: Tensor) -> Tensor:
    """Returns `labels` (answers, 3) with KTO's baseline in the last column.

    The baseline is the mean of the log-ratios whose sum and number `total` has, or 0 if negative.
    """
    baseline = (total[0] / total[1]).clamp(min=0).to(labels.device)
    return torch.cat([labels[:, :2], baseline.expand(len(labels), 1)], dim=1)


def get_contrasts(rows: Sequence[Encoded]) -> list[Encoded]:
    """Returns the mismatched prompt-answer pairs of `rows`; empty except for KTO."""
    return [other for row in rows for other in row.contrasts]


@dataclass(frozen=True)
class PreferenceEvaluator(Evaluator):
    """Evaluator of losses of the answers' log-likelihoods."""

    objective: Preferences

    def score(self, model: Any, record: ExampleRecord | None) -> dict[str, float]:
        """Returns loss and metrics; adds the rows to `record`, if any."""
        objective, total = self.objective, None
        with self._head(model) as head:
            if objective.needs_baseline:
                ratios = self._map_batches(
                    get_contrasts(self.rows),
                    lambda _, batch: sum_log_ratios(head, model, objective, [batch]),
                )
                total = sum((part for _, part in ratios), torch.zeros(2))

            def score(rows: Sequence[Encoded], batch: dict[str, Tensor]) -> BatchScores:
                log_probs = compute_answers(head, model, objective, batch)
                labels = batch[LABELS] if total is None else with_baseline(batch[LABELS], total)
                scores = BatchScores(objective, record)
                loss = objective.preference_sum(log_probs, labels, training=False)
                scores.stats.loss = loss.item()
                scores.stats.targets = int(objective.count(batch["labels"]))
                scores.stats.meter.update(log_probs, labels, rows)
                if scores.record is not None:
                    self._add(scores.record, rows, log_probs, labels)
                return scores

            parts = [part for _, part in self._map_batches(self.rows, score)]
        return merge_scores(objective, parts, record)

    def _add(
        self, record: ExampleRecord, rows: Sequence[Encoded], log_probs: Tensor, labels: Tensor
    ) -> None:
        width = len(log_probs) // len(rows)
        for index, row in enumerate(rows):
            of_row = slice(index * width, (index + 1) * width)
            own, own_labels = log_probs[of_row], labels[of_row]
            unit = record.units.setdefault(row.row, ExampleStats(self.objective.meter()))
            unit.loss += self.objective.preference_sum(own, own_labels, training=False).item()
            unit.targets += 1
            unit.meter.update(own, own_labels, [row])

    def compute_likelihoods(self, model: Any) -> np.ndarray:
        """Returns log-likelihoods `(rows, 2)`: of both answers, or of answer and mismatched one."""
        result = np.zeros((len(self.rows), 2), dtype=np.float32)
        with evaluating(model, self.device, self.dtype), self._head(model) as head:

            def score(rows: Sequence[Encoded], batch: dict[str, Tensor]) -> np.ndarray:
                log_probs = compute_answers(head, model, self.objective, batch)
                values: np.ndarray = log_probs[:, 0].float().cpu().numpy()
                return values.reshape(len(rows), -1)

            for indices, values in self._map_batches(self.rows, score):
                result[indices, : values.shape[1]] = values
            for indices, values in self._map_batches(get_contrasts(self.rows), score):
                result[indices, 1:] = values
        return result

    def _head(self, model: Any) -> Any:
        objective = self.objective if self.chunked_cross_entropy else None
        longest_rows = sorted(self.rows, key=lambda row: -row.length)[:2]
        return chunked_cross_entropy(
            model, objective, longest_rows, self.pad_id, self.device, self.dtype
        )

    def _map_batches(
        self,
        rows: Sequence[Encoded],
        compute: Callable[[Sequence[Encoded], dict[str, Tensor]], Any],
    ) -> list[tuple[Sequence[int], Any]]:
        """Returns row indices and `compute(rows, batch)` of batches of rows of similar length.

        Batches are padded, and divided among processes.
        """
        collate = Collator(self.pad_id)
        order = sorted(range(len(rows)), key=lambda i: rows[i].length, reverse=True)
        parts = list(batches(order, self.batch_size))

        def compute_batch(indices: Sequence[int]) -> Any:
            own = [rows[i] for i in indices]
            batch = collate(own)
            return compute(own, {name: value.to(self.device) for name, value in batch.items()})

        outputs = self.divide(lambda own: [compute_batch(indices) for indices in own], parts)
        return list(zip(parts, outputs, strict=True))
