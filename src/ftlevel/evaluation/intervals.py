"""What a model did row by row, and how far its metrics would move with other rows (bootstrap).

An example is the unit: all windows of a question, and all pieces of a text, belong together.

Whether one method scores better than another by more than chance, of rows and of seeds.

Chance has two sources, which are told apart. Other rows would have given another score: its size is
known from bootstrap draws of the rows, alike for all that were scored on them, so that differences
are paired. Another seed would have given another run: its size is known from several runs.

    se² = sd(difference over draws)² + sd(difference over seeds)² / seeds

A difference is beyond noise when it is larger than z · se, with z of the normal distribution at
5 % shared among all comparisons that are made (Bonferroni). With one seed the second term is not
known, and left out.

Which metrics an evaluation gives: all of the task, or those that the user names.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional

from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import ConfigError, did_you_mean, listing
from ftlevel.task import LikelihoodObjective, Meter, Objective, ScoreTexts
from ftlevel.tasks.base import BaseTask

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


LEVEL = 0.05


@dataclass(frozen=True)
class Scores:
    """What the runs of one method scored, by seed.

    Attributes:
        values: the metric of each run.
        draws: `(seeds, draws)`, the metric of each run on drawn rows; no columns where a draw
            cannot have it.
    """

    values: Sequence[float]
    draws: np.ndarray

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds; None of one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> list[float] | None:
        """The 95 % interval of the mean over other rows, these runs being what they are."""
        return interval(self.draws.mean(0)) if self.draws.size else None


@dataclass(frozen=True)
class Difference:
    """How far a method is from the best.

    Attributes:
        value: its mean less the best's.
        interval: 95 % of it over other rows.
        error: its standard error, of rows and seeds together.
        is_noise: whether it may be chance; None where nothing can be said.
    """

    value: float
    interval: list[float] | None
    error: float | None
    is_noise: bool | None


def differ(found: Scores, best: Scores, comparisons: int) -> Difference:
    """Return how far `found` is from `best`, scored on the same rows with the same seeds.

    Args:
        found: of a method.
        best: of the one that it is compared with.
        comparisons: how many are made in all.
    """
    value = found.mean - best.mean
    if found.draws.shape != best.draws.shape or not found.draws.size:
        return Difference(value, None, None, None)
    drawn = (found.draws - best.draws).mean(0)
    variance = float(drawn.var(ddof=1))
    if len(found.values) > 1:
        apart = [one - two for one, two in zip(found.values, best.values, strict=True)]
        variance += statistics.variance(apart) / len(apart)
    error = math.sqrt(variance)
    z = statistics.NormalDist().inv_cdf(1 - LEVEL / 2 / max(comparisons, 1))
    return Difference(value, interval(drawn), error, abs(value) <= z * error)


V = TypeVar("V")


def check_metrics(
    wish: Sequence[str], task: BaseTask, objective: Objective, *, generates: bool, how: str
) -> None:
    """Refuse names that no metric has.

    Args:
        wish: names of metrics; none for all.
        task: whose they are.
        objective: what the model is trained on.
        generates: whether texts are generated and scored.
        how: how they would be.

    Raises:
        ConfigError: naming those that there are.
    """
    known = ("loss", *objective.metrics, *(task.text_metrics if generates else ()))
    for name in wish:
        if name in known:
            continue
        if name in task.text_metrics:
            raise ConfigError(f"--metrics {name} is of generated texts. Add {how}.")
        raise ConfigError(
            f"--metrics: no metric of --task {task.name} is called {name!r}."
            f"{did_you_mean(name, known)} Metrics here: {listing(known, 20)}."
        )


def wants_texts(wish: Sequence[str], task: BaseTask) -> bool:
    """Whether one of the metrics that are wanted is of generated texts."""
    return not wish or bool(set(wish) & set(task.text_metrics))


def generates_texts(wish: bool | None, task: BaseTask) -> bool:
    """Whether texts are generated and scored: as the user says, or as the task does."""
    return task.generates if wish is None else wish and task.writes_text


def keep_wanted(found: Mapping[str, V], wish: Sequence[str]) -> dict[str, V]:
    """Return the loss, and of the other metrics those that are wanted; none named is all."""
    return {name: found[name] for name in found if not wish or name == "loss" or name in wish}
