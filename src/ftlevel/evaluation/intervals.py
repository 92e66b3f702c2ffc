"""What a model did row by row, and how far its metrics would move with other rows (bootstrap).

An example is the unit: all windows of a question, and all pieces of a text, belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from ftlevel.data.encoding.encode import Encoded
from ftlevel.task import LikelihoodObjective, Meter, Objective, ScoreTexts

PERCENTILES = (2.5, 97.5)


@dataclass
class Unit:
    """An example: its loss summed over its targets, their number, and a meter that saw it alone."""

    meter: Meter
    loss: float = 0.0
    targets: int = 0


@dataclass(frozen=True)
class Written:
    """A generated text beside its reference."""

    row: int
    text: str
    reference: str


class PerRow:
    """Keeps a unit for every example that an `Evaluator` scores; it is the evaluator's `Record`.

    Attributes:
        units: index of the example in its table → the unit, by index.
        written: the generated texts.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.units: dict[int, Unit] = {}
        self.written: list[Written] = []

    def add(
        self,
        rows: Sequence[Encoded],
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        """Score every row of a batch by itself."""
        objective, width = self.objective, len(logits) // len(rows)
        for index, row in enumerate(rows):
            own = slice(index * width, (index + 1) * width)
            unit = self.units.setdefault(row.row, Unit(objective.meter()))
            unit.loss += objective.loss_sum(logits[own], labels[own], mask[own]).item()
            unit.targets += int(objective.count(labels[own]))
            unit.meter.update(*objective.targets(logits[own], labels[own]), [row])

    def add_targets(
        self,
        rows: Sequence[Encoded],
        owners: torch.Tensor,
        scores: torch.Tensor,
        targets: torch.Tensor,
    ) -> None:
        """Score tokens `(tokens, vocabulary)` of a batch for the rows that own them."""
        losses = functional.cross_entropy(scores.float(), targets, reduction="none")
        for index in sorted(set(owners.tolist())):
            own, row = owners == index, rows[index]
            unit = self.units.setdefault(row.row, Unit(self.objective.meter()))
            unit.loss += losses[own].sum().item()
            unit.targets += int(own.sum())
            unit.meter.update(scores[own], targets[own], [row])

    def add_answers(
        self, rows: Sequence[Encoded], answers: torch.Tensor, verdicts: torch.Tensor
    ) -> None:
        """Judge the answers of every row by themselves."""
        objective, width = self.objective, len(answers) // len(rows)
        if not isinstance(objective, LikelihoodObjective):
            raise TypeError("only answers have a log-likelihood")
        for index, row in enumerate(rows):
            own = slice(index * width, (index + 1) * width)
            unit = self.units.setdefault(row.row, Unit(objective.meter()))
            unit.loss += objective.judge(answers[own], verdicts[own], training=False).item()
            unit.targets += 1
            unit.meter.update(answers[own], verdicts[own], [row])

    def add_texts(
        self, rows: Sequence[Encoded], texts: Sequence[str], references: Sequence[str]
    ) -> None:
        """Keep the generated texts."""
        for row, text, reference in zip(rows, texts, references, strict=True):
            self.written.append(Written(row.row, text, reference))

    def resample(
        self, count: int, seed: int, score_texts: ScoreTexts | None, language: str
    ) -> dict[str, np.ndarray]:
        """Return metric → its values over `count` draws of as many examples, with replacement.

        Two models that were scored on the same rows are drawn alike, so that their values can be
        subtracted one by one. A metric that a draw cannot have, such as a correlation of equal
        numbers, is left out.
        """
        units = [self.units[row] for row in sorted(self.units)]
        draws = _draw(count, seed, len(units), lambda picks: self._metrics(units, picks))
        if self.written and score_texts is not None:
            draws |= _draw(
                count, seed, len(self.written), _text_metrics(self.written, score_texts, language)
            )
        return draws

    @staticmethod
    def _metrics(units: Sequence[Unit], picks: np.ndarray) -> dict[str, float]:
        drawn = [units[pick] for pick in picks]
        targets = sum(unit.targets for unit in drawn)
        loss = sum(unit.loss for unit in drawn) / targets if targets else float("nan")
        meter = drawn[0].meter.pool([unit.meter for unit in drawn])
        return {"loss": loss, **meter.compute(loss)}


def _draw(
    count: int, seed: int, size: int, measure: Callable[[np.ndarray], Mapping[str, float]]
) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    rows = [measure(generator.integers(0, size, size)) for _ in range(count)]
    names = set(rows[0]).intersection(*rows) if rows else set()
    return {name: np.array([row[name] for row in rows]) for name in names}


def _text_metrics(
    written: Sequence[Written], score_texts: ScoreTexts, language: str
) -> Callable[[np.ndarray], Mapping[str, float]]:
    def measure(picks: np.ndarray) -> Mapping[str, float]:
        drawn = [written[pick] for pick in picks]
        return score_texts([w.text for w in drawn], [w.reference for w in drawn], language)

    return measure


def interval(values: np.ndarray) -> list[float]:
    """Return the 95 % percentile interval of the draws."""
    low, high = np.percentile(values, PERCENTILES)
    return [float(low), float(high)]
