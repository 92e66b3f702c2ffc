"""Whether one method scores better than another by more than chance, of rows and of seeds.

Chance has two sources, which are told apart. Other rows would have given another score: its size is
known from bootstrap draws of the rows, alike for all that were scored on them, so that differences
are paired. Another seed would have given another run: its size is known from several runs.

    se² = sd(difference over draws)² + sd(difference over seeds)² / seeds

A difference is beyond noise when it is larger than z · se, with z of the normal distribution at
5 % shared among all comparisons that are made (Bonferroni). With one seed the second term is not
known, and left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftlevel.evaluation.intervals import interval

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
