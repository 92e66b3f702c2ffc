"""Bootstrap confidence intervals of metrics, and tests of differences between methods.

    se² = sd(difference over draws)² + sd(difference over seeds)² / seeds

An example with all of its windows is drawn as one. Draws are the same for models scored on the same
rows, so differences are paired. A difference is significant above z · se, where z is the normal
quantile at 5 % divided by the number of comparisons (Bonferroni). With one seed the second term is
unknown and left out. The module also validates the metrics in `--metrics`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional

from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import ConfigError, did_you_mean, join_names
from ftlevel.objectives import Meter, Objective, ScoreTexts, SortedMeter
from ftlevel.tasks.base import BaseTask

PERCENTILES = (2.5, 97.5)


@dataclass
class ExampleStats:
    """Summed loss, number of targets and meter of an example, or of the examples of a batch."""

    meter: Meter
    loss: float = 0.0
    targets: int = 0

    def merge(self, other: ExampleStats) -> None:
        """Add the statistics `other` of further rows."""
        self.loss += other.loss
        self.targets += other.targets
        self.meter.merge(other.meter)


@dataclass(frozen=True)
class GeneratedText:
    """A generated text and its reference."""

    row: int
    text: str
    reference: str


class ExampleRecord:
    """Loss, targets and metrics per example; `units`: row index of the table → `ExampleStats`.

    `loss_groups` is the group of each row whose loss is that of a group of rows, not its own.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.units: dict[int, ExampleStats] = {}
        self._clusters: dict[Any, ExampleStats] = {}
        self._cluster_of: dict[int, Any] = {}
        self.loss_groups: dict[int, int] = {}
        self.written: list[GeneratedText] = []
        self.sampled: list[Encoded] = []  # a completion per prompt, in reinforcement learning

    def add(
        self,
        rows: Sequence[Encoded],
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        """Add each row of a batch to the statistics of its example."""
        objective, start = self.objective, 0
        for row in rows:
            rows_of_example = slice(start, start := start + len(row.sequences))
            loss = objective.loss_sum(
                logits[rows_of_example], labels[rows_of_example], mask[rows_of_example]
            ).item()
            num_targets = int(objective.count(labels[rows_of_example]))
            for unit in self._units_of(row):
                unit.loss += loss
                unit.targets += num_targets
                unit.meter.update(
                    *objective.targets(logits[rows_of_example], labels[rows_of_example]), [row]
                )

    def _units_of(self, row: Encoded) -> list[ExampleStats]:
        unit = self.units.setdefault(row.row, ExampleStats(self.objective.meter()))
        if row.group is None:
            return [unit]
        key = self._cluster_of[row.row] = row.group
        return [unit, self._clusters.setdefault(key, ExampleStats(self.objective.meter()))]

    def add_targets(
        self,
        rows: Sequence[Encoded],
        row_indices: torch.Tensor,
        scores: torch.Tensor,
        targets: torch.Tensor,
    ) -> None:
        """Add logits `(tokens, vocabulary)`; token i belongs to `rows[row_indices[i]]`."""
        losses = functional.cross_entropy(scores.float(), targets, reduction="none")
        for index in sorted(set(row_indices.tolist())):
            is_of_row, row = row_indices == index, rows[index]
            unit = self.units.setdefault(row.row, ExampleStats(self.objective.meter()))
            unit.loss += losses[is_of_row].sum().item()
            unit.targets += int(is_of_row.sum())
            unit.meter.update(scores[is_of_row], targets[is_of_row], [row])

    def merge(self, other: ExampleRecord) -> None:
        """Add the statistics of the rows of `other`; generated texts are not added."""
        for own, more in ((self.units, other.units), (self._clusters, other._clusters)):
            for key, unit in more.items():
                own.setdefault(key, ExampleStats(self.objective.meter())).merge(unit)
        self._cluster_of |= other._cluster_of
        self.loss_groups |= other.loss_groups

    def add_row(self, row: int, loss: float, targets: int, meter: Meter) -> None:
        """Add an example with its summed loss, number of targets and meter."""
        self.units[row] = ExampleStats(meter, loss, targets)

    def row_loss(self, row: int) -> float | None:
        """Returns the mean loss of a row; None if it has no target, or shares its loss."""
        unit = self.units[row]
        return unit.loss / unit.targets if unit.targets and row not in self.loss_groups else None

    def add_samples(self, row: Encoded, values: Any, texts: Sequence[str]) -> None:
        """Add a prompt's sampled completions, which have no loss; `values` as in `values_of`."""
        unit = self.units.setdefault(row.row, ExampleStats(self.objective.meter()))
        unit.meter.update(values, list(texts), [row])  # type: ignore[arg-type]

    def add_texts(
        self, rows: Sequence[Encoded], texts: Sequence[str], references: Sequence[str]
    ) -> None:
        """Add the texts generated for `rows`, and the reference texts."""
        for row, text, reference in zip(rows, texts, references, strict=True):
            self.written.append(GeneratedText(row.row, text, reference))

    def resample(
        self, num_draws: int, seed: int, score_texts: ScoreTexts | None, language: str
    ) -> dict[str, np.ndarray]:
        """Returns metric → values `(num_draws,)` over bootstrap draws of the examples or clusters.

        The same seed draws the same rows, so values of two models can be subtracted. A metric that
        is undefined for a draw, such as a correlation of constant values, is omitted, as are text
        metrics without `score_texts`. Clusters have equal `Encoded.group`. A loss that rows share
        is drawn by group, and omitted if there is only one.
        """
        rows = sorted(self.units)  # not in the order of scoring, which depends on the tokenizer
        keys = dict.fromkeys(self._cluster_of[row] for row in rows if row in self._cluster_of)
        units = [self._clusters[key] for key in keys] or [self.units[row] for row in rows]
        meters = [unit.meter for unit in units]
        compute = meters[0].resampler(meters) if isinstance(meters[0], SortedMeter) else None
        draws = _bootstrap(
            num_draws, seed, len(units), lambda indices: self._metrics(units, indices, compute)
        )
        if self.loss_groups:
            draws.pop("loss", None)
            groups: dict[int, list[ExampleStats]] = {}
            for row in rows:
                groups.setdefault(self.loss_groups[row], []).append(self.units[row])
            sums = np.array([[sum(u.loss for u in own), sum(u.targets for u in own)]
                             for own in groups.values()])  # fmt: skip
            if len(sums) > 1:
                draws = _bootstrap(num_draws, seed, len(sums), partial(_group_loss, sums)) | draws
        if self.written and score_texts is not None:
            draws |= _bootstrap(
                num_draws,
                seed,
                len(self.written),
                _text_metrics(self.written, score_texts, language),
            )
        return draws

    @staticmethod
    def _metrics(
        units: Sequence[ExampleStats],
        indices: np.ndarray,
        compute: Callable[[np.ndarray], dict[str, float]] | None = None,
    ) -> dict[str, float]:
        sample = [units[pick] for pick in indices]
        targets = sum(unit.targets for unit in sample)
        loss = sum(unit.loss for unit in sample) / targets if targets else float("nan")
        losses = {"loss": loss} if targets else {}
        if compute is not None:
            return losses | compute(np.bincount(indices, minlength=len(units)))
        return losses | sample[0].meter.pool([unit.meter for unit in sample]).compute(loss)


def _bootstrap(
    num_draws: int, seed: int, size: int, function: Callable[[np.ndarray], Mapping[str, float]]
) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    rows = [function(generator.integers(0, size, size)) for _ in range(num_draws)]
    names = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: np.array([row[name] for row in rows]) for name in names}


def _group_loss(sums: np.ndarray, indices: np.ndarray) -> dict[str, float]:
    """Returns the mean loss of the groups at `indices`; `sums` are `(groups, 2)`: loss, targets."""
    loss, targets = sums[indices].sum(0)
    return {"loss": float(loss / targets)} if targets else {}


def _text_metrics(
    written: Sequence[GeneratedText], score_texts: ScoreTexts, language: str
) -> Callable[[np.ndarray], Mapping[str, float]]:
    def compute(indices: np.ndarray) -> Mapping[str, float]:
        sample = [written[pick] for pick in indices]
        return score_texts([w.text for w in sample], [w.reference for w in sample], language)

    return compute


def interval(values: np.ndarray) -> list[float]:
    """Returns the 95 % percentile interval [low, high] of `values`."""
    low, high = np.percentile(values, PERCENTILES)
    return [float(low), float(high)]


LEVEL = 0.05


@dataclass(frozen=True)
class MetricRuns:
    """Values of a metric, one per seed; `draws` `(seeds, draws)` are values on resampled rows."""

    values: Sequence[float]
    draws: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> list[float] | None:
        """95 % interval of the mean over resampled rows; None without draws."""
        return interval(self.draws.mean(0)) if self.draws.size else None


@dataclass(frozen=True)
class Difference:
    """Difference of a metric between a method and the best method.

    `interval` is the 95 % interval over resampled rows, `error` the standard error from rows and
    seeds. `is_noise` says whether the difference is not significant; None if not tested.
    """

    value: float
    interval: list[float] | None
    error: float | None
    is_noise: bool | None


def compute_difference(runs: MetricRuns, best: MetricRuns, num_comparisons: int) -> Difference:
    """Compute the difference of `runs` from `best`, tested at level 5 % / `num_comparisons`."""
    value = runs.mean - best.mean
    if runs.draws.shape != best.draws.shape or not runs.draws.size:
        return Difference(value, None, None, None)
    sample = (runs.draws - best.draws).mean(0)
    variance = float(sample.var(ddof=1))
    if len(runs.values) > 1:
        deltas = [one - two for one, two in zip(runs.values, best.values, strict=True)]
        variance += statistics.variance(deltas) / len(deltas)
    error = math.sqrt(variance)
    z = statistics.NormalDist().inv_cdf(1 - LEVEL / 2 / max(num_comparisons, 1))
    return Difference(value, interval(sample), error, abs(value) <= z * error)


V = TypeVar("V")


def list_metrics(task: BaseTask, objective: Objective, *, generates: bool) -> tuple[str, ...]:
    """Returns the names of an evaluation's metrics, with `loss` unless the model samples."""
    loss = () if objective.samples else ("loss",)
    return (*loss, *objective.metrics, *(task.text_metrics if generates else ()))


def check_metrics(
    names: Sequence[str], task: BaseTask, objective: Objective, *, generates: bool, how: str
) -> None:
    """Raise ConfigError if a metric is unknown, or needs generation, which flag `how` enables."""
    valid = list_metrics(task, objective, generates=generates)
    for name in names:
        if name in valid:
            continue
        if name in task.text_metrics:
            raise ConfigError(f"--metrics {name} needs generated text. Add {how}.")
        raise ConfigError(
            f"--metrics: no metric of --task {task.name} is called {name!r}."
            f"{did_you_mean(name, valid)} Metrics here: {join_names(valid, 20)}."
        )


def uses_text_metrics(names: Sequence[str], task: BaseTask) -> bool:
    """Returns whether `names` has a metric of generated texts; empty `names` mean all metrics."""
    return not names or bool(set(names) & set(task.text_metrics))


def should_generate(predict_with_generate: bool | None, task: BaseTask) -> bool:
    """Returns whether to generate texts; by default (None), the task decides."""
    return (
        task.generates
        if predict_with_generate is None
        else predict_with_generate and task.generates_text
    )


def select_metrics(metrics: Mapping[str, V], names: Sequence[str]) -> dict[str, V]:
    """Returns the loss and the metrics in `names`; empty `names` mean all metrics."""
    return {name: metrics[name] for name in metrics if not names or name == "loss" or name in names}
